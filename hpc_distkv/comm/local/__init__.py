"""Ranks that are threads of one process, and schedules of them."""
