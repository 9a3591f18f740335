"""What all ranks, or all lanes of an instance, do together."""
