"""What it costs one instance to reach another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Classes = NDArray[np.int8]

ANYWHERE = np.iinfo(np.int8).max
"""A link class that includes all."""


class Links:
    """Cost classes of the links between instances, 0 being nearest, and what exchanges over them
    add to a step.

    Without a measurement the class is 0 on the same node, 1 behind the same switch, 2 elsewhere.
    """

    def __init__(
        self,
        nodes: Sequence[int],
        switches: Sequence[int] | None = None,
        *,
        seconds: NDArray[np.float64] | None = None,
        row_seconds: NDArray[np.float64] | None = None,
        exchange: Sequence[tuple[float, float]] = (),
    ) -> None:
        """`nodes` and `switches`: those of every instance.

        `seconds` [instances, instances]: the measured latency that an exchange adds to a step;
        `row_seconds`, of the same shape: what each of its query rows adds. `seconds` alone decide
        on the classes: log2 of the time over the shortest one, rounded, so that noise does not set
        equal links apart. An exchange counts as over the slowest link of its class. The diagonals
        are not read.

        `exchange`: without a measurement, both seconds by class; links of other classes cost
        nothing. Raises ValueError for lengths and shapes that differ and for times that are not
        positive.
        """
        self._nodes = np.asarray(nodes)
        self._switches = self._nodes if switches is None else np.asarray(switches)
        if self._switches.shape != self._nodes.shape:
            raise ValueError(f"{len(self._switches)} switches for {len(nodes)} instances")
        for times in (seconds, row_seconds):
            if times is not None and times.shape != (len(nodes), len(nodes)):
                raise ValueError(f"times {[*times.shape]} for {len(nodes)} instances")
        self._measured = None if seconds is None else _measured_classes(seconds)
        self._exchange = dict(enumerate(exchange))
        if self._measured is not None and seconds is not None:
            per_row = np.zeros_like(seconds) if row_seconds is None else row_seconds
            self._exchange = _slowest(self._measured, seconds, per_row)

    def __len__(self) -> int:
        """Instances."""
        return len(self._nodes)

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

    def exchange_seconds(self, link_class: int, rows: int) -> float:
        """What an exchange of `rows` query rows over a link of a class adds to a step; 0 if nobody
        knows."""
        latency, per_row = self._exchange.get(link_class, (0.0, 0.0))
        return latency + rows * per_row


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


def _slowest(
    classes: Classes, seconds: NDArray[np.float64], row_seconds: NDArray[np.float64]
) -> dict[int, tuple[float, float]]:
    """Class → the longest of both times over the links of the class."""
    apart = ~np.eye(len(classes), dtype=bool)
    links = {c: apart & (classes == c) for c in np.unique(classes[apart]).tolist()}
    return {c: (float(seconds[at].max()), float(row_seconds[at].max())) for c, at in links.items()}
