"""Which instance answers which request."""
