"""The tensors of a step: its layers, its queries at creditors, its guests, its new tokens."""
