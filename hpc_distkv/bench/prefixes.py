"""Rows that share a document, with prefix caching and without."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from hpc_distkv.bench.runs import alternate, ratios, run_once, synthetic, warm_up
from hpc_distkv.comm.transport import Comm
from hpc_distkv.control.messages.requests import Request
from hpc_distkv.model.decoder import Decoder
from hpc_distkv.ranks.rank import joined
from hpc_distkv.start.options import EngineOptions


def questions(
    rows: int, document: int, question: int, output_len: int, vocab_size: int
) -> list[Request]:
    """Rows that begin with the same `document` tokens and go on with `question` others."""
    (text,) = synthetic(1, document, 1, vocab_size, seed=1)
    asked = synthetic(rows, question, output_len, vocab_size)
    return [Request(row.id, text.prompt + row.prompt, row.sampling) for row in asked]


def sharing(
    comm: Comm,
    model: Decoder,
    options: EngineOptions,
    requests: Sequence[Request],
    distinct: int,
    repeats: int,
) -> dict[str, Any]:
    """The rows with prefix caching and without, in turn: on rank 0 the prompt tokens that were
    computed, also over the `distinct` ones, and the seconds. Collective."""
    engines = {
        way: joined(comm, model, replace(options, enable_prefix_caching=on))
        for way, on in (("shared", True), ("apart", False))
    }
    warm_up(engines["apart"], requests)
    computed: dict[str, int] = {}

    def seconds(way: str) -> float:
        comm.share(None)
        figures = run_once(engines[way], requests)
        if comm.world.rank == 0:
            computed[way] = int(figures["counters"]["prompt_tokens"])
        return float(figures["seconds"])

    took = alternate({way: partial(seconds, way) for way in engines}, repeats)
    if comm.world.rank:
        return {}
    return {
        "rows": len(requests),
        "prompt_tokens": sum(request.prompt_len for request in requests),
        "distinct_prompt_tokens": distinct,
        "computed_prompt_tokens": computed,
        "computed_over_distinct": {way: tokens / distinct for way, tokens in computed.items()},
        "seconds": {way: statistics.median(times) for way, times in took.items()},
        "apart_over_shared_time": ratios(took["apart"], took["shared"]),
    }
