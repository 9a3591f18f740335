"""The charts of a run's report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hpc_distkv.control.messages.percentiles import PERCENTILES
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
from hpc_distkv.observe.summary.run_files import History, Series
from hpc_distkv.units import seconds_text, short

LEFT, RIGHT = 64, 24
BINS = 80
"""Of a rate over time."""
SMALL_PANELS = 12
"""Instances up to which each has a panel; more are rows of one picture."""
MOST_ROWS = 64
"""Ranks or instances that are shown one by one."""
TIMES = {
    "compute_time": ("compute", "own"),
    "serve_time": ("serving debtors", "serve"),
    "host_time": ("attention in the host's memory", "host"),
    "partial_wait": ("waiting for partial results", "partials"),
    "move_wait": ("waiting for rBlocks", "moves"),
    "query_wait": ("waiting for queries", "queries"),
    "control_wait": ("waiting for rows", "control"),
    "lead_time": ("gManager, input, output", "lead"),
    "other_time": ("other", "other"),
}
"""Field of the counters → what it is called and its colour."""


def throughput(history: History) -> str:
    """Tokens per second and running rows over time."""
    times, edges = history.seconds, np.linspace(0, history.seconds[-1], BINS + 1)

    def rate(tokens: Series) -> Series:
        values: Series = np.diff(np.interp(edges, times, tokens.sum(axis=0))) / np.diff(edges)
        return values

    middles = (edges[:-1] + edges[1:]) / 2
    parts, top = [], 28.0
    for unit, at, values, style in (
        ("prompt tokens/s", middles, rate(history.prompt_tokens), "prompt"),
        ("output tokens/s", middles, rate(history.generated_tokens), "own"),
        ("rows running", times, history.running.sum(axis=0), "rows"),
    ):
        panel, ticks = _panel(times[-1], float(values.max()), top, top + 92)
        parts.append(panel.frame(unit, ticks, short))
        zeros = [(x, 0.0) for x in at]
        points = list(zip(at.tolist(), values.tolist(), strict=True))
        parts.append(panel.band(zeros, points, f"{style} area"))
        parts.append(panel.path(points, f"{style} line"))
        top += 140
    parts.append(panel.times())
    return drawing(panel.y.start + 22, *parts, title="Throughput over time")


def pools(history: History) -> str:
    """How full every pool was, and with whose rBlocks."""
    if history.instances > SMALL_PANELS:
        return _pool_rows(history)
    parts, top, height = [_legend([("own", "own rows"), ("hosted", "lent to others")])], 52.0, 72
    for instance in range(history.instances):
        capacity = float(history.capacity[instance])
        panel, _ = _panel(history.seconds[-1], capacity, top, top + height)
        panel = Panel(panel.x, Axis(0, capacity, top + height, top))
        ticks = [0.0, capacity / 2, capacity]
        parts.append(panel.frame(f"instance {instance}: rBlocks", ticks, short))
        times = history.seconds.tolist()
        own, both = history.own[instance], history.own[instance] + history.hosted[instance]
        lower = list(zip(times, own.tolist(), strict=True))
        upper = list(zip(times, both.tolist(), strict=True))
        parts.append(panel.band([(x, 0.0) for x in times], lower, "own fill"))
        parts.append(panel.band(lower, upper, "hosted fill"))
        top += height + 46
    parts.append(panel.times())
    return drawing(panel.y.start + 22, *parts, title="Use of KV pools over time")


def _pool_rows(history: History) -> str:
    """One row of colour per instance."""
    shown = min(history.instances, MOST_ROWS)
    height = 14
    used = (history.own + history.hosted) / np.maximum(history.capacity, 1)[:, None]
    edges = np.linspace(0, history.seconds[-1], 2 * BINS + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    bottom = 40.0 + shown * height
    panel, _ = _panel(history.seconds[-1], 1, 40, bottom)
    parts = [text(LEFT, 20, "instance; the darker, the fuller its pool", "unit")]
    for instance in range(shown):
        y = 40 + instance * height
        parts.append(text(LEFT - 6, y + 11, str(instance), "tick", "end"))
        for at, share in zip(
            edges, np.interp(middles, history.seconds, used[instance]), strict=False
        ):
            x, width = panel.x.at(at), panel.x.at(edges[1]) - panel.x.at(0)
            shade = f"shade{round(10 * float(share))}"
            parts.append(rect(x, y, width + 0.3, height - 1, shade, f"{share:.0%}"))
    parts.append(panel.times())
    if shown < history.instances:
        parts.append(text(LEFT, bottom + 40, f"and {history.instances - shown} more", "tick"))
    return drawing(bottom + 48, *parts, title="Use of KV pools over time")


def lent(history: History) -> str:
    """rBlocks lent in all, over time; the page moves the cursor `now`."""
    totals = [float(sum(debts.values())) for debts in history.debts]
    panel, ticks = _panel(history.seconds[-1], max(totals), 28, 110)
    points = list(zip(history.seconds.tolist(), totals, strict=True))
    return drawing(
        134,
        panel.frame("rBlocks lent or set aside, all pairs", ticks, short),
        panel.band([(x, 0.0) for x, _ in points], points, "hosted area"),
        panel.path(points, "hosted line"),
        '<line id="now" x1="0" x2="0" y1="28" y2="110" class="cursor"/>',
        panel.times(),
        title="rBlocks lent over time",
    )


def debt_matrix(members: Sequence[int]) -> str:
    """Who owes whom: cells with ids that the page fills for a moment."""
    cell = min(56.0, (WIDTH - 320) / max(1, len(members)))
    top, left = 72.0, 160.0
    parts = [
        text(left, 20, "creditor: whose memory it is", "unit"),
        text(left - 14, top - 10, "debtor", "unit", "end"),
    ]
    for column, creditor in enumerate(members):
        x = left + (column + 0.5) * cell
        parts.append(text(x, top - 10, str(creditor), "tick", "middle"))
    for row, debtor in enumerate(members):
        y = top + row * cell
        parts.append(text(left - 14, y + cell / 2 + 4, str(debtor), "tick", "end"))
        for column, creditor in enumerate(members):
            x = left + column * cell
            if debtor == creditor:
                parts.append(rect(x, y, cell - 2, cell - 2, "self"))
                continue
            name = f"{debtor}-{creditor}"
            parts.append(rect(x, y, cell - 2, cell - 2, "cell"))
            parts.append(
                f'<rect id="c{name}" x="{x:.1f}" y="{y:.1f}" width="{cell - 2:.1f}" '
                f'height="{cell - 2:.1f}" class="hosted fill" fill-opacity="0"/>'
            )
            if cell >= 24:
                place = f'x="{x + cell / 2 - 1:.1f}" y="{y + cell / 2 + 3:.1f}"'
                parts.append(f'<text id="t{name}" {place} class="value" text-anchor="middle"/>')
    return drawing(top + len(members) * cell + 8, *parts, title="Who owes whom")


def latencies(metrics: Mapping[str, Any]) -> str:
    """Distributions on a common logarithmic axis of seconds."""
    names = {
        "time_to_first_token_s": "from assignment to the first token",
        "between_tokens_s": "between two tokens of a row",
        "latency_s": "from assignment to the last token",
    }
    histograms = {n: metrics["histograms"][n] for n in names if metrics["histograms"].get(n)}
    if not histograms:
        return ""
    every = [seconds for bins in histograms.values() for seconds, _ in bins]
    # Whole decades, so that the labels stand at round times.
    low, high = math.floor(math.log10(min(every))), math.ceil(math.log10(max(every)) + 1e-9)
    x = Axis(10.0**low, 10.0 ** max(high, low + 1), LEFT, WIDTH - RIGHT, log=True)
    parts, top, height = [], 30.0, 76
    for name, bins in histograms.items():
        bottom = top + height
        most = max(count for _, count in bins)
        y = Axis(0, most, bottom, top + 14)
        total = sum(count for _, count in bins)
        parts.append(text(LEFT, top - 8, f"{names[name]} ({total:,})", "unit"))
        marks = [f"p{p} {seconds_text(metrics[name][f'p{p}'])}" for p in PERCENTILES]
        parts.append(text(WIDTH - RIGHT, top - 8, " · ".join(marks), "label", "end"))
        for seconds, count in bins:
            left, right = x.at(seconds / 2 ** (1 / 32)), x.at(seconds * 2 ** (1 / 32))
            hint = f"{seconds_text(seconds)}: {count:,}"
            parts.append(
                rect(left, y.at(count), right - left + 0.2, bottom - y.at(count), "own fill", hint)
            )
        parts.append(line(LEFT, bottom, WIDTH - RIGHT, bottom, "base"))
        for percentile in PERCENTILES:
            at = x.at(metrics[name][f"p{percentile}"])
            parts.append(line(at, top + 4, at, bottom, "mark"))
        top = bottom + 50
    for power in range(low, max(high, low + 1) + 1):
        at = x.at(10.0**power)
        parts.append(line(at, bottom, at, bottom + 4, "base"))
        words = f"{10.0**power:,.0f} s" if power >= 0 else seconds_text(10.0**power)
        parts.append(text(at, bottom + 18, words, "tick", "middle"))
    return drawing(bottom + 26, *parts, title="Distribution of latencies")


def where_time_goes(ranks: Sequence[Mapping[str, Any]]) -> str:
    """A bar of seconds for every rank, in parts."""
    shown = ranks[:MOST_ROWS]
    seconds = [sum(rank["counters"][name] for name in TIMES) for rank in shown]
    height = 26.0 if len(shown) <= 16 else 14.0
    used = [
        (style, words)
        for name, (words, style) in TIMES.items()
        if any(
            rank["counters"][name] > 0.005 * all for rank, all in zip(shown, seconds, strict=True)
        )
    ]
    rows = math.ceil(len(used) / 4)
    top = 26.0 + 20 * rows
    x = Axis(0, max([*seconds, 1e-9]), LEFT, WIDTH - RIGHT)
    parts = [_legend(used)]
    for number, rank in enumerate(shown):
        y = top + number * (height + 4)
        parts.append(text(LEFT - 6, y + height / 2 + 4, f"rank {rank['rank']}", "tick", "end"))
        parts += _bar(rank["counters"], x, y, height)
    bottom = top + len(shown) * (height + 4)
    panel = Panel(x, Axis(0, 1, bottom, top))
    parts.append(panel.times())
    if len(shown) < len(ranks):
        parts.append(text(LEFT, bottom + 40, f"and {len(ranks) - len(shown)} ranks more", "tick"))
    return drawing(
        bottom + (46 if len(shown) < len(ranks) else 22),
        *parts,
        title="Where the time of every rank goes",
    )


def _bar(counters: Mapping[str, float], x: Axis, y: float, height: float) -> list[str]:
    """The seconds of one rank, in parts."""
    parts, at, whole = [], 0.0, sum(counters[name] for name in TIMES)
    for name, (words, style) in TIMES.items():
        took = counters[name]
        left, width = x.at(at), x.at(at + took) - x.at(at)
        share = took / whole if whole else 0.0
        hint = f"{words}: {seconds_text(took)}, {share:.1%}"
        parts.append(rect(left, y, width, height, f"{style} fill", hint))
        if width > 44 and height > 20:
            middle, label = left + width / 2, f"{share:.0%}"
            parts.append(text(middle, y + height / 2 + 4, label, f"inside on-{style}", "middle"))
        at += took
    return parts


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    parts = []
    for number, (style, words) in enumerate(entries):
        x, y = LEFT + 215 * (number % 4), 14 + 20 * (number // 4)
        parts.append(rect(x, y - 10, 12, 12, f"{style} fill"))
        parts.append(text(x + 18, y, words, "label"))
    return "".join(parts)


def _panel(seconds: float, most: float, top: float, bottom: float) -> tuple[Panel, list[float]]:
    """A panel over the time of the run, and the ticks of its y axis."""
    ticks = nice_ticks(most)
    x = Axis(0, float(seconds), LEFT, WIDTH - RIGHT)
    return Panel(x, Axis(0, ticks[-1], bottom, top)), ticks
