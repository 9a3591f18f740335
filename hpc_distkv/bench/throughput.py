"""How fast rows are answered, here and by transformers, with a trace and without."""

from __future__ import annotations

import statistics
import time
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


def engine_throughput(
    comm: Comm, model: Decoder, options: EngineOptions, requests: Sequence[Request]
) -> dict[str, Any]:
    """One run over all ranks after a warm-up."""
    engine = joined(comm, model, options)
    warm_up(engine, requests)
    if comm.device.place.type == "cuda":  # Kernels are chosen and built by the sizes they meet.
        run_once(engine, requests)
    return run_once(engine, requests)


def transformers_throughput(
    path: str, model: Decoder, threads: int, requests: Sequence[Request], dummy: bool
) -> dict[str, Any]:
    """The same requests through transformers' `generate`, in the dtype and on the device of
    `model`: one static batch, greedy, no stop. `dummy`: with random weights."""
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(threads)
    make: Any = AutoModelForCausalLM
    if dummy:
        with model.device:
            other = make.from_config(AutoConfig.from_pretrained(path), dtype=model.dtype).eval()
    else:
        other = make.from_pretrained(path, dtype=model.dtype).to(model.device)
    tokens = torch.tensor(np.stack([np.frombuffer(r.prompt, "<i4") for r in requests])).long()
    tokens = tokens.to(model.device)
    new = requests[0].sampling.max_tokens
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    # On a GPU libraries choose and load kernels by the sizes they meet.
    other.generate(tokens if tokens.is_cuda else tokens[:, :16], max_new_tokens=2, **settings)
    started = time.perf_counter()
    other.generate(tokens, max_new_tokens=new, min_new_tokens=new, **settings).cpu()
    seconds = time.perf_counter() - started
    made = new * len(requests)
    return {"seconds": seconds, "output_tokens_per_second": made / seconds}


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
