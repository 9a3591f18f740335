"""Rows in, rows out. Rank 0 only."""
