"""From an engine's result to a line of the results file."""
