"""What it costs one instance to reach another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Classes = NDArray[np.int8]


class Links:
    """Cost classes between instances; 0 is nearest.

    Without a measurement: 0 on the same node, 1 behind the same switch, 2 anywhere else.
    """

    def __init__(
        self,
        nodes: Sequence[int],
        switches: Sequence[int] | None = None,
        seconds: NDArray[np.float64] | None = None,
    ) -> None:
        """`nodes` and `switches`: those of every instance.

        `seconds` [instances, instances]: measured round trips of one message of a query's size.
        They decide alone. The class is log2 of the time over the shortest one, rounded, so that
        noise does not set equal links apart. The diagonal is not read. Raises ValueError for
        lengths and shapes that differ and for times that are not positive.
        """
        self._nodes = np.asarray(nodes)
        self._switches = self._nodes if switches is None else np.asarray(switches)
        if self._switches.shape != self._nodes.shape:
            raise ValueError(f"{len(self._switches)} switches for {len(nodes)} instances")
        if seconds is not None and seconds.shape != (len(nodes), len(nodes)):
            raise ValueError(f"times {[*seconds.shape]} for {len(nodes)} instances")
        self._measured = None if seconds is None else _measured_classes(seconds)

    def classes(self, instance: int) -> Classes:
        """The cost class of every instance as seen from `instance`: int8 [instances]."""
        if self._measured is not None:
            measured: Classes = self._measured[instance]
            return measured
        away: NDArray[np.bool_] = self._nodes != self._nodes[instance]
        far: NDArray[np.bool_] = away & (self._switches != self._switches[instance])
        return away.astype(np.int8) + far

    def between(self, one: int, other: int) -> int:
        """The cost class of one pair."""
        if self._measured is not None:
            return int(self._measured[one, other])
        if self._nodes[one] == self._nodes[other]:
            return 0
        return 1 if self._switches[one] == self._switches[other] else 2


def _measured_classes(seconds: NDArray[np.float64]) -> Classes:
    """The shorter time of both directions counts: noise only ever delays."""
    apart = ~np.eye(len(seconds), dtype=bool)
    times = np.minimum(seconds, seconds.T)[apart]
    if not (np.isfinite(times) & (times > 0)).all():
        raise ValueError("measured round trips must be positive and finite")
    classes = np.zeros(seconds.shape, np.int8)
    classes[apart] = np.rint(np.log2(times / times.min(initial=np.inf)))
    classes.flags.writeable = False
    return classes
