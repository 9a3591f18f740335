"""How far a run is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from hpc_distkv.observe.summary.snapshot import Snapshot
from hpc_distkv.units import duration, stamped

LOG_INTERVAL = 10.0
"""Seconds between two lines of a log at first, ..."""
LONGEST_LOG_INTERVAL = 60.0
"""... and at last; between, they are a hundredth of the time so far."""
BAR_INTERVAL = 0.2
RATE_SECONDS = 10.0
"""Rates are those of the last so many seconds, or of the time since the last line."""
_UNREAD = contextlib.suppress(OSError, ValueError)
"""Around all writes: a stream that is full, broken or closed ends no run."""


class Tokens(NamedTuple):
    """Tokens of all ranks so far."""

    at: float
    prompt: int
    generated: int


class ProgressReport:
    """Prints to stderr, from rank 0, at its own pace however often it is told. What cannot be
    printed is lost."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """`stream`: in place of stderr."""
        self._stream = stream = stream or sys.stderr or open(os.devnull, "w")  # noqa: SIM115
        self.begin()
        self._bar: Live | None = None
        if stream.isatty():
            self._progress = Progress(
                BarColumn(), TextColumn("{task.percentage:3.0f}%  {task.description}")
            )
            self._task = self._progress.add_task("starting", total=1.0)
            self._bar = Live(self._progress, console=Console(file=stream), auto_refresh=False)
            with _UNREAD:
                self._bar.start()

    def begin(self) -> None:
        """The run begins now: its files are open, and all times count from here."""
        self._started = self._shown = time.monotonic()
        self._tokens = deque([Tokens(self._started, 0, 0)])

    @property
    def due(self) -> bool:
        """Whether `show` would print."""
        now = time.monotonic()
        interval = max(LOG_INTERVAL, min((now - self._started) / 100, LONGEST_LOG_INTERVAL))
        return now - self._shown >= (BAR_INTERVAL if self._bar else interval)

    def say(self, text: str) -> None:
        """Print a line of its own, with the time of day."""
        with _UNREAD:
            if self._bar:
                self._bar.console.print(Text(stamped(text)), soft_wrap=True)
            else:
                self._stream.write(f"{stamped(text)}\n")
                self._stream.flush()

    def show(self, now: Snapshot) -> None:
        """Print the snapshot if it is time to."""
        if not self.due:
            return
        self._shown = time.monotonic()
        passed = self._shown - self._started
        prompt, output = self._rates(now)
        left = now.seconds_left(passed)
        rows = f"{now.rows:,} of {'≈ ' if now.estimated else ''}{now.rows + now.left:,.0f}"
        parts = [
            f"{rows} rows, {now.errors:,} errors",
            f"{int(now.running.sum()):,} requests running, {now.waiting:,} waiting",
            f"{prompt:,.0f} prompt + {output:,.0f} output tokens/s",
            f"KV {now.pool_use:.0%} used, {now.lent} rBlocks lent",
            "" if left is None else f"{duration(left)} left",
        ]
        if self._bar:
            times = f"{duration(passed)}, {parts[-1] or 'no row has ended yet'}"
            self._progress.update(self._task, completed=now.fraction, description=times)
            with _UNREAD:
                self._bar.update(Group(self._progress, self._details(parts[:-1])), refresh=True)
        else:
            self.say(f"{now.fraction:4.0%}  {'; '.join(part for part in parts if part)}")

    def close(self) -> None:
        """End the bar, if there is one."""
        if self._bar:
            with _UNREAD:
                self._bar.stop()

    def _rates(self, now: Snapshot) -> tuple[float, float]:
        """Prompt and output tokens per second."""
        tokens = self._tokens
        new = Tokens(self._shown, int(now.prompt_tokens.sum()), int(now.generated_tokens.sum()))
        tokens.append(new)
        while len(tokens) > 2 and self._shown - tokens[1].at >= RATE_SECONDS:
            tokens.popleft()
        old = tokens[0]
        seconds = max(new.at - old.at, 1e-6)
        return (new.prompt - old.prompt) / seconds, (new.generated - old.generated) / seconds

    def _details(self, parts: Sequence[str]) -> Text:
        return Text("; ".join(parts), style="dim")
