#!/bin/bash
# Answer a batch file with 2 ranks under mpirun, on machines without Slurm.
# Written by: hpc-distkv sbatch --kind mpirun --no-activate

MODEL=${MODEL:-/path/to/model}
INPUT=${INPUT:-prompts.jsonl}
OUTPUT=${OUTPUT:-results.jsonl}

# A model directory is complete: nothing looks for the internet, which compute nodes often lack.
export HF_HUB_OFFLINE=1

# With Open MPI add --bind-to none: each rank takes its share of the cores. To stop the job in time,
# on any of its nodes: pkill -USR2 -x hpc-distkv (not mpirun itself, which may end at once).
mpirun -n 2 \
    hpc-distkv generate --model "$MODEL" -i "$INPUT" -o "$OUTPUT" --grace 90
status=$?

# 75: stopped by SIGUSR2 or SIGTERM with rows left. The same command goes on where it was.
exit "$status"
