"""`hpc-distkv` on a disk that is full after `MOST` bytes of a file, and is written to after
every round: `full_disk.py ARGUMENTS`. The limit comes when MPI has its files."""

from __future__ import annotations

import resource

from hpc_distkv.batch import job
from hpc_distkv.batch.results.files import Claims, Files
from hpc_distkv.cli.main import main

MOST = 20_000


def claim(files: Files, claims: object = Files.claim) -> Claims:
    resource.setrlimit(resource.RLIMIT_FSIZE, (MOST, MOST))
    return claims(files)


if __name__ == "__main__":
    Files.claim = claim
    job.COMMIT_INTERVAL = 0.0
    main()
