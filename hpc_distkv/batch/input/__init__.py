"""From lines of a batch file to requests."""
