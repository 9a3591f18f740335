"""Who lends to whom, and when it pays."""
