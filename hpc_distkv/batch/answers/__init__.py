"""From an engine's result to a text (choice), and to a line of the results file (line)."""
