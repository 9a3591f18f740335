"""What is noted while a simulated job runs, and its figures at the end."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from hpc_distkv.control.messages.counters import Counters
from hpc_distkv.control.messages.percentiles import gap_summary, percentiles
from hpc_distkv.control.messages.requests import Result
from hpc_distkv.observe.summary.metrics import Latencies, peak_memory, total
from hpc_distkv.simulate.deployment import Deployment
from hpc_distkv.simulate.workload import TraceRow


class Record:
    """Owner of a simulated job's figures. Virtual times come from outside; wall times are what the
    simulation itself takes."""

    def __init__(self) -> None:
        self.answered = self.refused = 0
        """Rows."""
        self.seconds = 0.0
        """Until the last row was answered."""
        self.counters: Sequence[Counters] = ()
        """By instance."""
        self._started = time.perf_counter()
        self._prompt_tokens = self._output_tokens = 0
        self._first_token = Latencies()
        self._total = Latencies()
        self._rounds = array("d")
        self._bytes = array("q")
        self._prompt_bytes = 0

    def start(self, row: TraceRow) -> None:
        """A row is given to the gManager."""
        self._prompt_tokens += row.prompt
        self._prompt_bytes += 4 * row.prompt

    def refuse(self) -> None:
        """A row could never end: in a job it becomes an error row."""
        self.refused += 1

    def finish(self, result: Result) -> None:
        """A row is answered."""
        self.answered += 1
        self._output_tokens += len(result.tokens) // 4
        self._first_token.add(result.first_token_time)
        self._total.add(result.total_time)

    def round(self, seconds: float, reports: Sequence[bytes], answers: Sequence[bytes]) -> None:
        """A control round, with what its answers would carry of prompts."""
        self._rounds.append(seconds)
        self._bytes.append(sum(map(len, reports)) + sum(map(len, answers)) + self._prompt_bytes)
        self._prompt_bytes = 0

    def figures(self, deployment: Deployment) -> dict[str, Any]:
        """All figures. Latencies count from a row's assignment to an instance; tokens per second
        are those of rows, so what was computed again after a preemption does not count."""
        counters = total(self.counters)
        gaps = gap_summary(counters.pop("gaps"))
        held, seconds = counters["held_block_steps"], self.seconds or float("inf")
        tokens = self._prompt_tokens + self._output_tokens
        return {
            "gpus": deployment.gpus,
            "tensor_parallel_size": deployment.tp,
            "instances": deployment.instances,
            "pool_blocks": deployment.config.num_blocks,
            "host_blocks": deployment.config.host_blocks,
            "block_size": deployment.config.block_size,
            "row_capacity_tokens": deployment.capacity_tokens,
            "rows": {"answered": self.answered, "refused": self.refused},
            "prompt_tokens": self._prompt_tokens,
            "output_tokens": self._output_tokens,
            "seconds": self.seconds,
            "rows_per_second": self.answered / seconds,
            "tokens_per_second": tokens / seconds,
            "output_tokens_per_second": self._output_tokens / seconds,
            "output_tokens_per_second_per_gpu": self._output_tokens / seconds / deployment.gpus,
            "time_to_first_token_s": self._first_token.summary(),
            "latency_s": self._total.summary(),
            "between_tokens_s": gaps,
            "remote_share": counters["remote_block_steps"] / held if held else 0.0,
            "counters": counters,
            "rounds": {
                "count": len(self._rounds),
                "wall_s": _summary(self._rounds),
                "bytes": _summary(self._bytes),
            },
            "simulation": {
                "wall_s": time.perf_counter() - self._started,
                "peak_memory_bytes": peak_memory(),
            },
        }


def _summary(values: Sequence[float]) -> dict[str, float]:
    """Mean, percentiles and maximum; empty without values."""
    return {"mean": fmean(values), **percentiles(sorted(values))} if values else {}
