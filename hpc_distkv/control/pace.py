"""How far instances that have loans go until their next boundary, and with how much per step."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from typing import NamedTuple

from hpc_distkv.control.wire import Reports

ROUND_SECONDS = 0.2
"""Goal for the wall time between two boundaries of instances that have loans."""
MAX_STEPS = 64
"""Most steps between two boundaries: bounds the harm of a wrong step time."""
DIGESTED_IN = 16
"""Steps over which partners spread the prompts they have."""
LEAST_PROMPT = 32
"""Prompt tokens that fit in every step."""


class Pace(NamedTuple):
    """What holds for every instance of a component."""

    component: Sequence[int]
    steps: int
    budget: int
    """Most tokens in a step."""


def paces(
    reports: Reports,
    components: Iterable[Sequence[int]],
    given_rows: Container[int],
    max_tokens: int,
) -> Iterator[Pace]:
    """The pace of every component.

    Steps are such that a round lasts about equally long everywhere: as long as the slowest
    component needs for one step, but no shorter than the goal. New rows (`given_rows`: instances
    that get some) mean steps with prompts; where none was measured yet, one step is all that is
    foreseeable.

    Partners wait for the slowest of them in every step, so prompts are cut into chunks as even as
    can be: with a budget for all that follows their mean backlog.
    """
    slowest = max(ROUND_SECONDS, float(reports["step_time"].max(initial=0)))
    for component in components:
        times = [
            float(reports["chunk_time" if i in given_rows else "step_time"][i]) for i in component
        ]
        known = all(time or i not in given_rows for time, i in zip(times, component, strict=True))
        pace = max(times)
        steps = min(MAX_STEPS, max(1, int(slowest / pace))) if pace and known else 1
        backlog = sum(int(reports["prompt_left"][i]) for i in component) / len(component)
        decodes = max(int(reports["running"][i]) for i in component)
        budget = decodes + max(LEAST_PROMPT, int(backlog / DIGESTED_IN))
        yield Pace(component, steps, min(max_tokens, budget))
