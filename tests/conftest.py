"""Makes this folder importable, for what tests share (`from mpirun import run_mpi`)."""
