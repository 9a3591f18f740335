"""What rank 0 notes about a run while it goes on, and the summary at its end."""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from hpc_distkv.batch.job import Job
from hpc_distkv.comm.world import World
from hpc_distkv.control.messages.counters import Counters
from hpc_distkv.control.messages.percentiles import gap_summary
from hpc_distkv.control.messages.requests import Result
from hpc_distkv.observe.summary.metrics import Latencies, RankFigures, histogram, total

SLOWEST = 20
"""Answers that are listed by name."""


class SlowAnswer(NamedTuple):
    """One answer of a row; the slowest are the largest."""

    latency_s: float
    time_to_first_token_s: float
    output_tokens: int
    prompt_tokens: int
    custom_id: str


class RunRecord:
    """Owner of a run's clock and of its answers' latencies."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._first_token = Latencies()
        self._total = Latencies()
        self._slowest: list[SlowAnswer] = []
        """A heap."""
        self.output_tokens = 0
        self.prompt_tokens = 0
        """The `usage` of the rows answered in this run."""

    def add(self, results: Sequence[Result], custom_id: str = "", prompt_tokens: int = 0) -> None:
        """One more answered row."""
        self.prompt_tokens += prompt_tokens
        for result in results:
            self._add_answer(result, custom_id, prompt_tokens)

    def _add_answer(self, result: Result, custom_id: str, prompt_tokens: int) -> None:
        output_tokens = len(result.tokens) // 4
        self._first_token.add(result.first_token_time)
        self._total.add(result.total_time)
        self.output_tokens += output_tokens
        row = SlowAnswer(
            round(result.total_time, 4),
            round(result.first_token_time, 4),
            output_tokens,
            prompt_tokens,
            custom_id,
        )
        if len(self._slowest) < SLOWEST:
            heapq.heappush(self._slowest, row)
        else:
            heapq.heappushpop(self._slowest, row)

    def summary(
        self,
        counters: Sequence[Counters],
        peak_memory: Sequence[int],
        peak_used: Sequence[int] = (),
    ) -> dict[str, Any]:
        """The figures of the run; `counters` by instance, `peak_memory` in bytes per rank,
        `peak_used` in rBlocks by instance.

        Rates are those of what was computed in this run, as in vLLM's log: `generated_tokens` of
        the counters over the seconds of the run, whether or not their row has ended in it, and for
        `tokens_per_second` also the prompt tokens that were computed. So the legs of a job add up.
        `output_tokens` and `prompt_tokens` are another thing: the `usage` of the rows that were
        answered in this run, which may have been begun in an earlier one. Latencies count from an
        answer's assignment to an instance.
        """
        seconds = time.monotonic() - self._started
        figures = total(counters)
        gaps = figures.pop("gaps")
        held = figures["held_block_steps"]
        computed = figures["prompt_tokens"] + figures["generated_tokens"]
        return {
            "seconds": round(seconds, 3),
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "output_tokens_per_second": round(figures["generated_tokens"] / seconds, 2),
            "tokens_per_second": round(computed / seconds, 2),
            "time_to_first_token_s": self._first_token.summary(),
            "between_tokens_s": gap_summary(gaps),
            "latency_s": self._total.summary(),
            "histograms": {
                "time_to_first_token_s": histogram(self._first_token.bins()),
                "between_tokens_s": histogram(gaps),
                "latency_s": histogram(self._total.bins()),
            },
            "peak_kv_blocks": list(peak_used),
            "remote_share": round(figures["remote_block_steps"] / held, 4) if held else 0.0,
            "peak_memory_bytes": list(peak_memory),
            "counters": _rounded(figures),
            "slowest_rows": [row._asdict() for row in sorted(self._slowest, reverse=True)],
        }

    def figures(
        self, job: Job, ranks: Sequence[RankFigures], world: World, peak_used: Sequence[int]
    ) -> dict[str, Any]:
        """All figures of a job's run, `ranks` by rank; `peak_used` as of `summary`."""
        rows = {
            "answered": job.answered,
            "failed": job.failed,
            "answered_before": job.answered_before,
            "failed_before": job.failed_before,
            "total": job.total_rows,
            "put_aside": job.begun_rows,
        }
        stopped = {
            "stopped": not job.complete,
            "put_aside_tokens": job.begun_tokens,
            "rows_not_in_input": job.left_over,
            "rows_not_in_input_such_as": job.names_left_over,
            "input_torn": job.torn,
        }
        requests = {
            "total": job.total_rows,
            "completed": job.answered + job.answered_before,
            "failed": job.failed + job.failed_before,
        }
        counters = [rank.counters for rank in ranks[:: world.tp]]
        summary = self.summary(counters, [rank.peak_memory for rank in ranks], peak_used)
        each = [
            {
                "rank": number,
                "host": world.hosts[number] if world.hosts else None,
                "instance": world.instance_of(number),
                "threads": rank.threads,
                "counters": _rounded(total([rank.counters])),
            }
            for number, rank in enumerate(ranks)
        ]
        return {"request_counts": requests, "rows": rows, **stopped, **summary, "ranks": each}


def _rounded(figures: dict[str, Any]) -> dict[str, float]:
    """Numbers as they are shown; what is no number is left out."""
    return {n: round(v, 4) for n, v in figures.items() if isinstance(v, int | float)}
