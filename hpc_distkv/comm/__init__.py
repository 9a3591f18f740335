"""Ranks, and how bytes travel between them."""
