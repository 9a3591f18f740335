"""When requests begin that are too large for one pool."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpc_distkv.control.assign.assignment import Assignment
from hpc_distkv.control.messages.reports import Large, Reports
from hpc_distkv.control.round import Round

SHARE = 0.85
"""Part of the pools within reach that such requests may come to fill together: the others need
room too, and what is expected of outputs is not exact."""
CONSIDERED, MOST_CONSIDERED = 16, 256
"""How many requests that have no home, and how many in all, are looked at in a round."""


class Placed(NamedTuple):
    """A request at its home, or where it would begin."""

    home: int
    large: Large


def begin_large(round: Round, assignment: Assignment, step_tokens: float) -> list[Placed]:
    """The requests that begin now: of those that wait for a home, or at home where they were
    preempted. `step_tokens`: prompt tokens that could be computed in the time of a decode step.

    A request too large for one pool begins when all such requests, as their prompts grow and as
    they end, will have room in the pools within its reach. What it needs is not gathered before: it
    borrows as it goes on, while small requests leave what they had. Oldest first, at the instance
    with most room that has no such request. The oldest always begins sooner or later: the others
    that have begun end, and alone it may take all there is.
    """
    reports = round.reports
    at_home = [Placed(i, each) for i, changes in reports.changes.items() for each in changes.large]
    begun = [placed for placed in at_home if placed.large.begun]
    waiting = [placed for placed in at_home if not placed.large.begun]
    waiting += _not_assigned(reports, assignment, {placed.home for placed in at_home})
    waiting.sort(key=lambda placed: placed.large.request)
    blocked = np.zeros(len(reports), dtype=bool)
    begin = []
    for placed in waiting[:MOST_CONSIDERED]:
        home, one = placed
        near = round.links.classes(home) <= round.reach(home, one.blocks)
        # One that goes on with what others share may need little: it passes.
        large = one.blocks > reports.capacity[home]
        if large and (blocked & near).any():
            continue  # an older one waits for the same room
        pools = int(reports.capacity[near].sum())
        # Requests too large for the pools around their homes take part everywhere.
        beside = [other for other in begun if near[other.home] or other.large.blocks > pools]
        # Long prompts at one home are computed one after the other.
        busy = large and any(other.home == home and other.large.prompt for other in beside)
        together = [one, *(other.large for other in beside)]
        if beside and (busy or peak(together, step_tokens) > SHARE * pools):
            blocked |= near
        else:
            begun.append(placed)
            begin.append(placed)
    return begin


def _not_assigned(reports: Reports, assignment: Assignment, taken: set[int]) -> Iterator[Placed]:
    """The oldest requests that have no home, each with one that it might get."""
    requests = assignment.large(CONSIDERED, reports.work_left)
    if not requests:
        return
    able = np.flatnonzero(reports.seats > 0)
    order = np.lexsort((reports.work_left[able], -reports.free[able]))
    homes = (home for home in able[order].tolist() if home not in taken)
    for request, home in zip(requests, homes, strict=False):
        yield Placed(home, request)


def peak(requests: Sequence[Large], step_tokens: float) -> float:
    """Most rBlocks that the requests have at once if all of them go on from now, each at its own
    home: until its prompt is computed a request takes more and more, then it keeps what it has
    until it ends. `step_tokens` as of `begin_large`."""
    numbers = np.array([(r.held, r.blocks, r.prompt, r.output) for r in requests], dtype=np.float64)
    held, blocks, prompt, output = numbers.T
    ends = prompt + output * step_tokens
    growth = np.maximum(0, blocks - held)
    # Nothing shrinks before it ends, so the most is there just before one of them ends.
    moments = np.sort(ends)
    gone = _before(moments, ends, held + growth)
    grown = _before(moments, prompt, growth, inclusive=True)
    rate = np.divide(growth, prompt, out=np.zeros_like(growth), where=prompt > 0)
    growing = moments * (rate.sum() - _before(moments, prompt, rate, inclusive=True))
    return float((held.sum() - gone + grown + growing).max())


def _before(
    moments: NDArray[np.float64],
    times: NDArray[np.float64],
    values: NDArray[np.float64],
    inclusive: bool = False,
) -> NDArray[np.float64]:
    """For each of `moments` the sum of `values` whose times come before it, or with it too."""
    order = np.argsort(times)
    sums = np.concatenate(([0.0], np.cumsum(values[order])))
    places = np.searchsorted(times[order], moments, side="right" if inclusive else "left")
    before: NDArray[np.float64] = sums[places]
    return before
