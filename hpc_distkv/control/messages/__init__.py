"""What travels in a control round and between loan partners."""
