"""The parts of an RManager: each is the only writer of its fields."""
