"""The results file and what lies beside it."""
