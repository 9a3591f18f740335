"""Plots of measured figures, as SVG files that are the same bytes for the same figures.

matplotlib is loaded when the first plot is drawn: nothing else needs it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_distkv.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

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

INK, FAINT = "#333333", "#E6E6E6"
WIDTH, LINES_HEIGHT = 6.4, 3.6
ROW_HEIGHT = 0.2
"""Inches that a bar takes."""
LABEL_GAP = 0.06
"""Least distance of two line labels, as a share of the height of the axes."""
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "font.size": 9,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "svg.hashsalt": "hpc-distkv",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "xtick.labelsize": 9,
    "ytick.color": INK,
    "ytick.labelsize": 9,
}


def bars(
    path: Path,
    title: str,
    groups: Mapping[str, Mapping[str, float]],
    unit: str,
    baseline: str | None = None,
) -> None:
    """Draw a bar for every value: groups (traces) from top to bottom, in each its names (policies).

    `unit` says what the bars are. With a `baseline` the values are ratios to it, and a dashed line
    stands at 1. A value that is not finite has no bar. Raises OptionError without matplotlib,
    OSError.
    """
    names = dict.fromkeys(name for group in groups.values() for name in group)
    colours = colours_of(names)
    rows = sum(len(group) + 1.5 for group in groups.values())
    with drawing(path, title, 0.8 + ROW_HEIGHT * rows) as axes:
        ticks: dict[float, str] = {}
        y = 0.0
        for heading, group in groups.items():
            write(axes, 0, y, heading, weight="bold")
            for name, value in group.items():
                y += 1
                ticks[y] = name
                draw_bar(axes, y, value, colours[name], ratio=baseline is not None)
            y += 1.5
        axes.set_yticks(list(ticks), list(ticks.values()))
        axes.tick_params(left=False, bottom=False, labelbottom=False)
        axes.set_ylim(max(y, 1.0) - 0.75, -0.75)
        axes.set_xlim(left=0)
        axes.spines["bottom"].set_visible(False)
        axes.set_xlabel(unit if baseline is None else f"{unit} ({baseline} = 1)", loc="left")
        if baseline is not None:
            axes.axvline(1.0, color=INK, linewidth=0.8, linestyle="--")


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
    OptionError without matplotlib, OSError."""
    colours = colours_of(series)
    series = {
        name: [(x, y) for x, y in points if has_place(x, log_x) and has_place(y, log_y)]
        for name, points in series.items()
    }
    series = {name: points for name, points in series.items() if points}
    with drawing(path, title, LINES_HEIGHT) as axes:
        for name, points in series.items():
            axes.plot(*zip(*points, strict=True), "o-", color=colours[name], lw=1.5, ms=3.5)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(axis="y")
        axes.set_xscale("log" if log_x else "linear")
        axes.set_yscale("log" if log_y else "linear")
        set_ticks(axes.xaxis, log_x, {x for points in series.values() for x, _ in points})
        set_ticks(axes.yaxis, log_y)
        if not log_y and axes.dataLim.ymin >= 0:
            axes.set_ylim(bottom=0)
        label_lines(axes, {name: points[-1] for name, points in series.items()}, colours)


def plot_folder(path: str) -> Path:
    """The folder `path`, made if need be, where plots can be drawn: looked at before a run, which
    may take hours, and not after it. Raises OptionError."""
    try:
        import matplotlib  # noqa: F401

        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
    except ImportError as error:
        raise OptionError(
            f"plots need matplotlib ({error}): pip install 'hpc-distkv[plots]'"
        ) from error
    except OSError as error:
        raise OptionError(f"cannot write to the folder {path}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise OptionError(f"cannot write to the folder {path}")
    return folder


@contextmanager
def drawing(path: Path, title: str, height: float) -> Iterator[Axes]:
    """Axes to draw on, `height` inches high with all that is around them; then write the file."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title, loc="left")
        yield axes
        figure.savefig(path, format="svg", metadata={"Date": None})


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """The colour of every name: a policy's own, for others those that are left."""
    names = list(names)
    taken = {POLICY_COLOURS[name] for name in names if name in POLICY_COLOURS}
    left = cycle([colour for colour in OTHER_COLOURS if colour not in taken])
    return {name: POLICY_COLOURS.get(name) or next(left) for name in names}


def draw_bar(axes: Axes, y: float, value: float, colour: str, ratio: bool) -> None:
    """A bar and its value."""
    length, label = (value, number(value, ratio)) if math.isfinite(value) else (0.0, "–")
    axes.barh(y, length, 0.8, color=colour)
    write(axes, length, y, label)


def write(axes: Axes, x: float, y: float, text: str, weight: str = "normal") -> None:
    """A text right of a point. Behind it a line is interrupted."""
    axes.annotate(
        text,
        (x, y),
        (3, 0),
        textcoords="offset points",
        va="center",
        weight=weight,
        bbox={"facecolor": "white", "linewidth": 0, "pad": 0.5},
    )


def number(value: float, ratio: bool) -> str:
    """A value in three digits or as an integer, a ratio to two places."""
    if ratio:
        return f"{value:.2f}"
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def has_place(value: float, log: bool) -> bool:
    """Whether an axis can show it."""
    return math.isfinite(value) and (value > 0 or not log)


def set_ticks(axis: Axis, log: bool, values: Iterable[float] = ()) -> None:
    """Plain numbers along an axis. On a logarithmic one the ticks are the `values` themselves where
    they are few and apart, else 1, 2, 5 in every decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if log:
        ticks = sorted(values)
        if 2 <= len(ticks) <= 12 and all(b / a >= 1.5 for a, b in pairwise(ticks)):
            axis.set_ticks(ticks)
        else:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def label_lines(
    axes: Axes, ends: Mapping[str, tuple[float, float]], colours: Mapping[str, str]
) -> None:
    """Write every line's name beside its end, in its colour, and no two over each other."""
    axes.autoscale_view()
    to_share = axes.transData - axes.transAxes
    heights = spread([float(to_share.transform(end)[1]) for end in ends.values()], LABEL_GAP)
    for (name, end), height in zip(ends.items(), heights, strict=True):
        axes.annotate(
            name,
            end,
            (1.03, height),
            textcoords="axes fraction",
            color=colours[name],
            va="center",
            arrowprops={"arrowstyle": "-", "color": colours[name], "lw": 0.8, "ls": ":"},
        )


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
