"""MicroAttention on CPUs: kernels in C."""
