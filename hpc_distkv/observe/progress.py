"""How far a run is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from typing import NamedTuple, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

LOG_INTERVAL = 10.0
"""Seconds between two lines of a log."""
BAR_INTERVAL = 0.2


class State(NamedTuple):
    """What a run looks like at one moment."""

    fraction: float
    """Part of the input that is behind us, 0 to 1."""
    rows: int
    """Rows with a line in the results."""
    failed: int
    running: int
    tokens: int
    """Prompt and output tokens computed so far."""
    used: float
    """Part of all rBlocks in use, 0 to 1."""
    lent: int
    """rBlocks lent at the moment."""


class ProgressReport:
    """Prints to stderr, from rank 0, at its own pace however often it is told."""

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self._stream = stream
        self._started = self._shown = time.monotonic()
        self._bar: Progress | None = None
        if stream.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:3.0f}%"),
                TimeElapsedColumn(),
                console=Console(file=stream),
                auto_refresh=False,
            )
            self._task = self._bar.add_task("starting", total=1.0)
            self._bar.start()

    @property
    def due(self) -> bool:
        """Whether `show` would print."""
        interval = BAR_INTERVAL if self._bar else LOG_INTERVAL
        return time.monotonic() - self._shown >= interval

    def show(self, state: State) -> None:
        """Print the state if it is time to."""
        if not self.due:
            return
        now = self._shown = time.monotonic()
        text = (
            f"{state.rows} rows ({state.failed} errors), {state.running} running, "
            f"{state.tokens / (now - self._started):.0f} tokens/s, "
            f"KV {state.used:.0%} used, {state.lent} rBlocks lent"
        )
        if self._bar:
            self._bar.update(self._task, completed=state.fraction, description=text, refresh=True)
        else:
            passed = now - self._started
            self._stream.write(f"[{passed:7.0f} s] {state.fraction:4.0%}  {text}\n")
            self._stream.flush()

    def close(self) -> None:
        """End the bar, if there is one."""
        if self._bar:
            self._bar.stop()
