"""`hpc-distkv` whose model fails on rank 1 alone: `failing_model.py ARGUMENTS`."""

from __future__ import annotations

import os

from hpc_distkv.cli.main import main
from hpc_distkv.model.decoder import Decoder

RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")


def out_of_memory(*args: object) -> None:
    raise RuntimeError("the accelerator of this rank is out of memory")


if __name__ == "__main__":
    if any(os.environ.get(name) == "1" for name in RANK_VARIABLES):
        Decoder.hidden = out_of_memory
    main()
