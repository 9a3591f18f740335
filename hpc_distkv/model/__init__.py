"""The decoder, its weights, its tokenizer. Knows nothing of ranks."""
