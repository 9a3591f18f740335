"""Job scripts, as they lie in `jobs/` and as `hpc-distkv sbatch` writes them."""
