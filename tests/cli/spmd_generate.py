"""A program that uses the library, on every rank: `spmd_generate.py MODEL ROWS ANSWERS`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from hpc_distkv import Engine, EngineOptions


def run(model: str, rows: Path, answers: Path) -> None:
    options = EngineOptions(dtype="float32", num_blocks=64, block_size=16, threads=1)
    engine = Engine(model, options, sampling={"temperature": 0.0})
    found = engine.generate(json.loads(line) for line in rows.open())
    if engine.comm.world.rank == 0:
        again = engine.generate([found_row(rows, -1)])
        answers.write_text(json.dumps(found + again))
    else:
        assert found == engine.generate([]) == []
    engine.comm.close()


def found_row(rows: Path, place: int) -> dict:
    return json.loads(rows.read_text().splitlines()[place])


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
