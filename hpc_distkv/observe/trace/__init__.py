"""When a rank did what."""
