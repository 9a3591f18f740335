"""Plots of measured figures, as SVG files that are the same bytes for the same figures."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, pairwise
from pathlib import Path

from hpc_distkv.errors import OptionError
from hpc_distkv.observe.report.svg import (
    WIDTH,
    Axis,
    Panel,
    drawing,
    line,
    nice_ticks,
    rect,
    text,
)

POLICY_COLOURS = {
    "lend": "#0072B2",
    "lend-greedy": "#56B4E9",
    "migrate": "#E69F00",
    "queue": "#009E73",
    "isolated": "#7F7F7F",
    "tensor-parallel": "#CC79A7",
}
"""A policy has the same colour in every plot. From the palette of Okabe and Ito (2008), whose
colours can be told apart by people with any of the common kinds of colour blindness."""
OTHER_COLOURS = ("#D55E00", "#000000", *POLICY_COLOURS.values())
"""For other names: in this order, without the colours of the policies beside them."""

LEFT, RIGHT, TOP = 150, 170, 70
"""Pixels around the axes: for the names of bars or the ticks, for values or the names of lines, and
for the title."""
ROW_HEIGHT, LINES_HEIGHT = 24, 320
"""Pixels that a bar takes, and the axes of lines."""
LABEL_GAP = 0.06
"""Least distance of two line labels, as a share of the height of the axes."""
STYLE = """
text { font: 15px sans-serif; fill: #333333; }
.title { font-size: 17px; font-weight: bold; } .heading { font-weight: bold; }
.value { stroke: #ffffff; stroke-width: 6px; paint-order: stroke; }
.paper { fill: #ffffff; } .grid { stroke: #e6e6e6; } .base { stroke: #333333; }
.mark { stroke: #333333; stroke-dasharray: 6 4; }
.fill, .name { fill: currentColor; }
.line { stroke: currentColor; stroke-width: 2; fill: none; }
.leader { stroke: currentColor; stroke-dasharray: 1 3; }
"""


def bars(
    path: Path,
    title: str,
    groups: Mapping[str, Mapping[str, float]],
    unit: str,
    baseline: str | None = None,
) -> None:
    """Draw a bar for every value: groups (traces) from top to bottom, in each its names (policies).

    `unit` says what the bars are. With a `baseline` the values are ratios to it, and a dashed line
    stands at 1. A value that is not finite has no bar. Raises OSError.
    """
    colours = colours_of(name for group in groups.values() for name in group)
    finite = [v for group in groups.values() for v in group.values() if math.isfinite(v)]
    x = Axis(0, max([*finite, 0.0]) or 1.0, LEFT, WIDTH - RIGHT)
    parts, y = [], float(TOP)
    for heading, group in groups.items():
        parts.append(text(LEFT + 6, y, heading, "value heading"))
        for name, value in group.items():
            parts += bar(x, y + 9, name, value, style(name, colours), ratio=baseline is not None)
            y += ROW_HEIGHT
        y += 1.5 * ROW_HEIGHT
    parts.insert(0, line(LEFT, TOP, LEFT, y - ROW_HEIGHT, "base"))
    if baseline is not None:
        parts.insert(0, line(x.at(1.0), TOP, x.at(1.0), y - ROW_HEIGHT, "mark"))
        unit = f"{unit} ({baseline} = 1)"
    write(path, title, y + ROW_HEIGHT, [*parts, text(LEFT, y, unit)], colours)


def lines(
    path: Path,
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
) -> None:
    """Draw a line through the (x, y) points of every series, in their order, and its name at the
    right. A linear y axis begins at 0 unless there are values below. Points that have no place are
    left out: those that are not finite, on a logarithmic axis those that are not positive. Raises
    OSError."""
    colours = colours_of(series)
    series = {
        name: [(x, y) for x, y in points if has_place(x, log_x) and has_place(y, log_y)]
        for name, points in series.items()
    }
    series = {name: points for name, points in series.items() if points}
    xs, ys = ({point[axis] for points in series.values() for point in points} for axis in (0, 1))
    x_ticks, y_ticks = ticks_of(xs, log_x), ticks_of(ys if log_y else {0.0, *ys}, log_y)
    bottom = float(TOP + LINES_HEIGHT)
    panel = Panel(
        Axis(x_ticks[0], x_ticks[-1], LEFT, WIDTH - RIGHT, log_x),
        Axis(y_ticks[0], y_ticks[-1], bottom, TOP, log_y),
    )
    parts = [panel.frame(y_label, y_ticks, plain), *x_axis(panel, x_label, x_ticks)]
    for name, points in series.items():
        parts.append(panel.path(points, f"{style(name, colours)} line"))
        for x, y in points:
            place = f'cx="{panel.x.at(x):.2f}" cy="{panel.y.at(y):.2f}"'
            parts.append(f'<circle {place} r="4" class="{style(name, colours)} fill"/>')
    ends = {name: points[-1] for name, points in series.items()}
    write(path, title, bottom + 60, [*parts, *line_labels(panel, ends, colours)], colours)


def plot_folder(path: str) -> Path:
    """The folder `path`, made if need be, where plots can be drawn: looked at before a run, which
    may take hours, and not after it. Raises OptionError."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"cannot write to the folder {path}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise OptionError(f"cannot write to the folder {path}")
    return folder


def write(
    path: Path, title: str, height: float, parts: Iterable[str], colours: Mapping[str, str]
) -> None:
    """Write the drawing of `parts` under its title, with a style of its own."""
    rules = [f".{style(name, colours)} {{ color: {colour}; }}" for name, colour in colours.items()]
    sheet = f"<style>{STYLE}{' '.join(rules)}</style>"
    paper = rect(0, 0, WIDTH, height, "paper")
    drawn = drawing(height, sheet, paper, text(LEFT, 28, title, "title"), *parts, title=title)
    path.write_text(drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n")


def style(name: str, colours: Mapping[str, str]) -> str:
    """The class of what has the colour of `name`."""
    return f"c{list(colours).index(name)}"


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """The colour of every name: a policy's own, for others those that are left."""
    names = list(dict.fromkeys(names))
    taken = {POLICY_COLOURS[name] for name in names if name in POLICY_COLOURS}
    left = cycle([colour for colour in OTHER_COLOURS if colour not in taken])
    return {name: POLICY_COLOURS.get(name) or next(left) for name in names}


def bar(x: Axis, y: float, name: str, value: float, colour: str, *, ratio: bool) -> list[str]:
    """A bar from `y` downwards, its name left of it and its value right of it."""
    end, label = x.start, "–"
    if math.isfinite(value):
        end, label = x.at(value), number(value, ratio)
    return [
        text(x.start - 8, y + 15, name, "tick", "end"),
        rect(x.start, y, end - x.start, ROW_HEIGHT - 4, f"{colour} fill"),
        text(end + 6, y + 15, label, "value"),
    ]


def x_axis(panel: Panel, label: str, ticks: Iterable[float]) -> list[str]:
    """Both axes' lines, and below the horizontal one the numbers at its ticks and what it shows."""
    left, right, bottom = panel.x.start, panel.x.end, panel.y.start
    parts = [
        line(left, panel.y.end, left, bottom, "base"),
        line(left, bottom, right, bottom, "base"),
    ]
    for tick in ticks:
        at = panel.x.at(tick)
        parts.append(line(at, bottom, at, bottom + 5, "base"))
        parts.append(text(at, bottom + 22, plain(tick), "tick", "middle"))
    return [*parts, text((left + right) / 2, bottom + 46, label, "", "middle")]


def number(value: float, ratio: bool) -> str:
    """A value in three digits or as an integer, a ratio to two places."""
    if ratio:
        return f"{value:.2f}"
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def plain(value: float) -> str:
    """The number at a tick."""
    return f"{value:,.10g}"


def has_place(value: float, log: bool) -> bool:
    """Whether an axis can show it."""
    return math.isfinite(value) and (value > 0 or not log)


def ticks_of(values: Iterable[float], log: bool) -> list[float]:
    """Ascending round numbers, from one that is not above all `values` to one that is not below. On
    a logarithmic axis they are the values themselves where these are few and apart, else 1, 2, 5 in
    every decade."""
    found = sorted(values) or [1.0, 10.0]
    least, most = found[0], found[-1]
    if not log:
        return nice_ticks(most, 4, least)
    if 2 <= len(found) <= 12 and all(b / a >= 1.5 for a, b in pairwise(found)):
        return found
    decades = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    every = [digit * 10.0**power for power in decades for digit in (1, 2, 5)]
    first = max(at for at, tick in enumerate(every) if tick <= least)
    last = min(at for at, tick in enumerate(every) if tick >= most)
    return every[first : max(last, first + 1) + 1]


def line_labels(
    panel: Panel, ends: Mapping[str, tuple[float, float]], colours: Mapping[str, str]
) -> list[str]:
    """Every line's name right of the axes, at the height of its end, in its colour, and no two over
    each other."""
    unit, right = Axis(0, 1, panel.y.start, panel.y.end), WIDTH - RIGHT + 24
    shares = [(panel.y.at(y) - unit.start) / (unit.end - unit.start) for _, y in ends.values()]
    parts = []
    for (name, (x, y)), share in zip(ends.items(), spread(shares, LABEL_GAP), strict=True):
        at, colour = unit.at(share), style(name, colours)
        parts.append(line(panel.x.at(x), panel.y.at(y), right - 4, at, f"{colour} leader"))
        parts.append(text(right, at + 5, name, f"{colour} name"))
    return parts


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights in the same order, moved apart to at least `gap`; none above 1 that fits below."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    moved = list(heights)
    for below, above in pairwise(order):
        moved[above] = max(moved[above], moved[below] + gap)
    if order:
        moved[order[-1]] = min(moved[order[-1]], 1.0)
    for above, below in pairwise(reversed(order)):
        moved[below] = min(moved[below], moved[above] - gap)
    return moved
