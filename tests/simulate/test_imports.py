"""A cluster is simulated on a login node, where torch may not even load."""

from __future__ import annotations

import subprocess
import sys

EVERY_MODULE = """
import importlib, pkgutil, sys
import hpc_distkv.simulate as room
for module in pkgutil.iter_modules(room.__path__, "hpc_distkv.simulate."):
    importlib.import_module(module.name)
print(sorted({"torch", "mpi4py.MPI", "hpc_distkv.simulate.simulation"} & set(sys.modules)))
"""


def test_the_simulator_loads_neither_torch_nor_mpi() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", EVERY_MODULE], capture_output=True, text=True, check=False
    )
    assert ran.stdout == "['hpc_distkv.simulate.simulation']\n", ran.stderr
