"""What a trace costs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from hpc_distkv.bench.runs import alternate, ratios, run_once, warm_up
from hpc_distkv.comm.transport import Comm
from hpc_distkv.control.messages.requests import Request
from hpc_distkv.model.decoder import Decoder
from hpc_distkv.observe.trace.spans import begin_trace
from hpc_distkv.ranks.rank import joined
from hpc_distkv.start.options import EngineOptions
from hpc_distkv.step.timesheet import Recorder


def traced_against_plain(
    comm: Comm, model: Decoder, options: EngineOptions, requests: Sequence[Request], repeats: int
) -> dict[str, Any]:
    """The same rows with a trace and without."""
    engine = joined(comm, model, options)
    warm_up(engine, requests)

    def seconds(recorder: Recorder | None) -> float:
        comm.share(None)
        return max(comm.share(float(run_once(engine, requests, recorder)["seconds"])))

    ways = {"traced": lambda: seconds(begin_trace(comm)), "plain": lambda: seconds(None)}
    times = alternate(ways, repeats)
    return {
        "seconds": {way: statistics.median(values) for way, values in times.items()},
        "traced_over_plain_time": ratios(times["traced"], times["plain"]),
    }
