"""`hpc-distkv` whose model fails on rank 1 alone: `failing_model.py ARGUMENTS`; of one argument, a
program that cannot even load it there: `failing_model.py MODEL`."""

from __future__ import annotations

import os
import sys

from hpc_distkv import Engine
from hpc_distkv.cli.main import main
from hpc_distkv.model.decoder import Decoder

RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")


def lose(*args: object, **named: object) -> None:
    raise LookupError("the accelerator of this rank is lost")


if __name__ == "__main__":
    loads = len(sys.argv) == 2
    if any(os.environ.get(name) == "1" for name in RANK_VARIABLES):
        setattr(Decoder, "__init__" if loads else "hidden", lose)
    if loads:
        Engine(sys.argv[1])
    else:
        main()
