"""What rank 0 notes about a run while it goes on, and the summary at its end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from hpc_distkv.control.gaps import gap_summary
from hpc_distkv.control.messages import Counters, Result
from hpc_distkv.observe.latency import Latencies
from hpc_distkv.observe.metrics import total


class RunRecord:
    """Owner of a run's clock and of its rows' latencies."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._first_token = Latencies()
        self._total = Latencies()
        self.output_tokens = 0

    def add(self, result: Result) -> None:
        """One more answered row."""
        self._first_token.add(result.first_token_time)
        self._total.add(result.total_time)
        self.output_tokens += len(result.tokens) // 4

    def summary(self, counters: Sequence[Counters], peak_memory: Sequence[int]) -> dict[str, Any]:
        """The figures of the run; `peak_memory` in bytes per rank. Latencies count from a row's
        assignment to an instance."""
        seconds = time.monotonic() - self._started
        figures = total(counters)
        gaps = gap_summary(figures.pop("gaps"))
        held = figures["held_block_steps"]
        computed = figures["prompt_tokens"] + figures["generated_tokens"]
        return {
            "seconds": round(seconds, 3),
            "output_tokens": self.output_tokens,
            "output_tokens_per_second": round(self.output_tokens / seconds, 2),
            "tokens_per_second": round(computed / seconds, 2),
            "time_to_first_token_s": self._first_token.summary(),
            "latency_s": self._total.summary(),
            "between_tokens_s": gaps,
            "remote_share": round(figures["remote_block_steps"] / held, 4) if held else 0.0,
            "peak_memory_bytes": list(peak_memory),
            "counters": {name: round(value, 4) for name, value in figures.items()},
        }
