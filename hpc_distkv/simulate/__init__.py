"""A cluster in virtual time: traces, cost model, and the product's own scheduling code."""
