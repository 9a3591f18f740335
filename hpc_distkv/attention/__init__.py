"""MicroAttention: kernels, their choice, and the merge of partials."""
