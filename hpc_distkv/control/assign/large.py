"""When rows begin that are too large for one pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpc_distkv.control.assign.assignment import Assignment
from hpc_distkv.control.lending.links import Links
from hpc_distkv.control.messages.reports import Large, Reports

SHARE = 0.85
"""Part of the pools within reach that such rows may come to fill together: the others need room
too, and what is expected of outputs is not exact."""
CONSIDERED, MOST_CONSIDERED = 16, 256
"""How many rows that have no home, and how many in all, are looked at in a round."""


class Placed(NamedTuple):
    """A row at its home, or where it would begin."""

    home: int
    row: Large


class LargeRequests:
    """Lets a row that is too large for one pool begin when all such rows, as their prompts grow and
    as they end, will have room in the pools within its reach. What it needs is not gathered before:
    it borrows as it goes on, while small rows leave what they had. Oldest first, at the instance
    with most room that has no such row.

    The oldest always begins sooner or later: the others that have begun end, and alone it may take
    all there is.
    """

    def __init__(self, assignment: Assignment, links: Links, block_size: int) -> None:
        self._assignment, self._links, self._block_size = assignment, links, block_size

    def begin(
        self, reports: Reports, reach: Callable[[int, int], int], step_tokens: float
    ) -> list[Placed]:
        """Those that begin now: of the assignment, or at home where they were preempted. `reach`:
        (home, rBlocks of a row) → the highest link class of its creditors; `step_tokens`: prompt
        tokens that could be computed in the time of a decode step."""
        at_home = [
            Placed(i, row) for i, changes in reports.changes.items() for row in changes.large
        ]
        begun = [placed for placed in at_home if placed.row.begun]
        waiting = [placed for placed in at_home if not placed.row.begun]
        waiting += self._not_assigned(reports, {placed.home for placed in at_home})
        waiting.sort(key=lambda placed: placed.row.request)
        blocked = np.zeros(len(reports), dtype=bool)
        capacity = reports["capacity"]
        begin = []
        for placed in waiting[:MOST_CONSIDERED]:
            home, row = placed
            near = self._links.classes(home) <= reach(home, row.blocks)
            # One that goes on with what others share may need little: it passes.
            large = row.blocks > capacity[home]
            if large and (blocked & near).any():
                continue  # an older one waits for the same room
            pools = int(capacity[near].sum())
            # Rows too large for the pools around their homes take part everywhere.
            beside = [other for other in begun if near[other.home] or other.row.blocks > pools]
            # Long prompts at one home are computed one after the other.
            busy = large and any(other.home == home and other.row.prompt for other in beside)
            rows = [row, *(other.row for other in beside)]
            if beside and (busy or peak(rows, step_tokens) > SHARE * pools):
                blocked |= near
            else:
                begun.append(placed)
                begin.append(placed)
        return begin

    def _not_assigned(self, reports: Reports, taken: set[int]) -> Iterator[Placed]:
        """The oldest rows that have no home, each with one that it might get."""
        work_left = reports["work_left"]
        rows = self._assignment.large_rows(CONSIDERED, self._block_size, work_left)
        if not rows:
            return
        able = np.flatnonzero(reports["seats"] > 0)
        order = np.lexsort((work_left[able], -reports["free"][able]))
        homes = (home for home in able[order].tolist() if home not in taken)
        for row, home in zip(rows, homes, strict=False):
            yield Placed(home, row)


def peak(rows: Sequence[Large], step_tokens: float) -> float:
    """Most rBlocks that the rows have at once if all of them go on from now, each at its own home:
    until its prompt is computed a row takes more and more, then it keeps what it has until it ends.
    `step_tokens` as of `LargeRequests.begin`."""
    numbers = np.array([(r.held, r.blocks, r.prompt, r.output) for r in rows], dtype=np.float64)
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
