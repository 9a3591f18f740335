"""Small runs as rank 0 would have seen them."""

from __future__ import annotations

import numpy as np

from hpc_distkv.comm.world import World
from hpc_distkv.observe.summary.snapshot import Snapshot
from hpc_distkv.observe.trace.spans import DTYPE, RankSpans
from hpc_distkv.step.timesheet import Kind


def snapshot(at: float, used: list[int], hosted: list[int], debts: list, **fields) -> Snapshot:
    """Of instances with pools of 100 rBlocks; tokens grow with time."""
    n = len(used)
    values = {
        "answered": int(at),
        "failed": 0,
        "before": 0,
        "failed_before": 0,
        "left": 10.0,
        "estimated": True,
        "least_seconds": 0.0,
        "waiting": 3,
        "running": np.full(n, 2),
        "prompt_tokens": np.full(n, int(100 * at)),
        "generated_tokens": np.full(n, int(10 * at)),
        "capacity": np.full(n, 100),
    }
    arrays = {"used": np.array(used), "hosted": np.array(hosted)}
    return Snapshot(at=at, debts=debts, **arrays, **(values | fields))


def spans(*rows) -> np.ndarray:
    """(kind, started, ended, one, other) of each."""
    return np.array([tuple(row) for row in rows], DTYPE)


def two_ranks():
    """World, spans and timeline of a run in which instance 1 lends 6 rBlocks to instance 0."""
    first = spans(
        (Kind.PARTIALS, 1.2, 1.3, 0, 1),
        (Kind.LAYER, 1.1, 1.5, 0, 0),
        (Kind.STEP, 1.0, 2.0, 3, 3),
        (Kind.EXCHANGE, 1.1, 1.3, 0, 1),
        (Kind.ROUND, 0.5, 1.6, 1, 0),
        (Kind.LEAD, 2.0, 2.1, 2, 0),
    )
    second = spans((Kind.SERVE, 1.15, 1.25, 0, 0), (Kind.VISIT, 1.0, 2.2, 0, 3))
    ranks = [RankSpans(first, 1, 0.0), RankSpans(second, 2, 4e-6)]
    world = World(0, (0, 1), hosts=("nid1", "nid2"))
    timeline = [
        snapshot(1.0, [20, 10], [0, 0], []),
        snapshot(2.0, [90, 16], [0, 6], [(0, 1, 6)]),
        snapshot(3.0, [0, 0], [0, 0], []),
    ]
    return world, ranks, timeline
