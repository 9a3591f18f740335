"""Benchmarks: figures of one run, and ratios of ways measured side by side in one run."""
