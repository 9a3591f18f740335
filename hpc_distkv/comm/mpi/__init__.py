"""Ranks over MPI."""
