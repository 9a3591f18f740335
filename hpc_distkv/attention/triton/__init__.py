"""MicroAttention on GPUs: kernels in Triton."""
