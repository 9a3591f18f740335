"""Charts as SVG text. Colours are classes, so that a style sheet decides on them: the page's on
light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 960
"""Of every drawing, in pixels at full size."""
STEPS = (1, 2, 5, 10)
TIME_STEPS = (
    *(1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400),
)
Points = Iterable[tuple[float, float]]


def drawing(height: float, *parts: str, title: str) -> str:
    """A drawing of WIDTH × `height`; `title` is for those who cannot see it."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def text(x: float, y: float, words: str, style: str = "", anchor: str = "start") -> str:
    """Words with their baseline at `y`."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}">'
        f"{escape(words)}</text>"
    )


def rect(x: float, y: float, width: float, height: float, style: str, hint: str = "") -> str:
    """A filled rectangle; `hint` shows under the pointer."""
    title = f"<title>{escape(hint)}</title>" if hint else ""
    return (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{max(0.0, width):.2f}" '
        f'height="{max(0.0, height):.2f}" class="{style}">{title}</rect>'
    )


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    """A straight line."""
    return f'<line x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}" class="{style}"/>'


@dataclass(frozen=True)
class Axis:
    """Values → pixels."""

    least: float
    most: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The place of a value."""
        low, high, it = self.least, self.most, value
        if self.log:
            low, high, it = math.log(low), math.log(high), math.log(max(value, low))
        share = (it - low) / (high - low) if high > low else 0.0
        return self.start + share * (self.end - self.start)


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    x: Axis
    y: Axis

    def path(self, points: Points, style: str) -> str:
        """A line through the points."""
        return f'<path d="M{self._joined(points)}" class="{style}"/>'

    def band(self, lower: Points, upper: Points, style: str) -> str:
        """What lies between two lines."""
        back = list(upper)[::-1]
        return f'<path d="M{self._joined(lower)}L{self._joined(back)}Z" class="{style}"/>'

    def frame(self, unit: str, ticks: Sequence[float], show: Callable[[float], str]) -> str:
        """Horizontal lines at `ticks` of the y axis with their values, `unit` above the last."""
        parts = []
        for tick in ticks:
            y = self.y.at(tick)
            parts.append(line(self.x.start, y, self.x.end, y, "base" if tick == 0 else "grid"))
            parts.append(text(self.x.start - 6, y + 4, show(tick), "tick", "end"))
        parts.append(text(self.x.start, self.y.end - 8, unit, "unit"))
        return "".join(parts)

    def times(self) -> str:
        """Moments below the x axis."""
        y = self.y.start + 16
        step = time_step(self.x.most)
        parts = []
        for n in range(int(self.x.most / step + 1e-9) + 1):
            x = self.x.at(n * step)
            parts.append(line(x, self.y.start, x, self.y.start + 4, "base"))
            parts.append(text(x, y, clock(n * step, step), "tick", "middle"))
        return "".join(parts)

    def _joined(self, points: Points) -> str:
        return "L".join(f"{self.x.at(x):.2f},{self.y.at(y):.2f}" for x, y in points)


def nice_ticks(most: float, count: int = 3, least: float = 0.0) -> list[float]:
    """About `count` + 1 round numbers, from one that is not above `least` to one that is not below
    `most`."""
    span = most - least
    if span <= 0:
        return [least, least + 1.0]
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * s for s in STEPS if power * s * count >= span * 0.999)
    first, last = math.floor(least / step + 1e-9), math.ceil(most / step - 1e-9)
    return [step * n for n in range(first, last + 1)]


def time_step(seconds: float, count: int = 8) -> float:
    """A round time of which at most `count` fit into `seconds`."""
    fitting = (step for step in TIME_STEPS if step * count >= seconds)
    return next(fitting, 86400.0 * math.ceil(seconds / count / 86400))


def clock(seconds: float, step: float) -> str:
    """A moment on an axis with steps of `step` seconds."""
    if seconds == 0:
        return "0"
    if step < 60 and seconds < 180:
        return f"{seconds:g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if step < 60 else f"{hours}:{minutes:02} h"
