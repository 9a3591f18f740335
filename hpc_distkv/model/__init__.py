"""The decoder, its weights (all, or a shard), its tokenizer. Knows no way from rank to rank."""
