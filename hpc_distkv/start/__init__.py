"""Before the first step: options, memory, loading. What sizes a job imports no torch."""
