"""Under mpirun: every rank probes, and rank 0 prints as JSON what each of them got."""

from __future__ import annotations

import json

from hpc_distkv.comm.abort import aborting
from hpc_distkv.comm.collective.probe import probe
from hpc_distkv.comm.mpi.start import open_mpi


def main() -> None:
    with aborting(open_mpi(stall_timeout=20.0)) as comm:
        costs = probe(comm, 10_000, 1 << 20)
        everyone = comm.share(None if costs is None else costs._asdict())
        if comm.world.rank == 0:
            print(json.dumps(everyone), flush=True)


if __name__ == "__main__":
    main()
