"""What is seen of runs: progress, metrics, traces, reports."""
