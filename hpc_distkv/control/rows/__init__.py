"""Which instance answers which row."""
