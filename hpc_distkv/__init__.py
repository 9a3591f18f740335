"""Offline batch generation with a KV cache that is spread over MPI ranks (arXiv 2401.02669)."""
