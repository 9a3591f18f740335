"""Plots: what the SVG files show."""

from __future__ import annotations

import itertools
import math
import random
import re

import pytest

from hpc_distkv.bench.plots import POLICY_COLOURS, bars, colours_of, lines, plot_folder, spread
from hpc_distkv.errors import OptionError

RATIOS = {
    "long": {"lend": 1.8, "queue": 1.0, "isolated": 0.6},
    "short & <even>": {"lend": 1.01, "queue": 1.0, "isolated": math.nan},
}
CURVES = {
    "lend": [(1, 10), (10, 100), (100, 1000)],
    "queue": [(1, 8), (10, 60), (100, 200)],
}


@pytest.fixture
def svg(tmp_path):
    """The text of an SVG file that one of the functions draws from the arguments."""

    def draw(function, *args, **options):
        path = tmp_path / "plot.svg"
        function(path, *args, **options)
        return path.read_text()

    return draw


def texts(svg):
    """All texts of a plot."""
    return re.findall(r"<text [^>]*>(.*?)</text>", svg)


def drawn_in(svg, tag, kind, colour):
    """The attributes of what is of this colour and `kind` (fill or line)."""
    (name,) = re.findall(rf"\.(c\d+) {{ color: {colour}; }}", svg)
    found = re.findall(rf'<{tag} ([^>]*) class="{name} {kind}"', svg)
    return [dict(re.findall(r'(\w+)="([^"]*)"', attributes)) for attributes in found]


def lines_of(svg, colour):
    """The (x, y) corners of the lines of a colour."""
    return [
        [tuple(map(float, corner.split(","))) for corner in path["d"][1:].split("L")]
        for path in drawn_in(svg, "path", "line", colour)
    ]


def bars_of(svg, colour):
    """Left end and width of all bars of a colour, from top to bottom."""
    boxes = sorted(drawn_in(svg, "rect", "fill", colour), key=lambda box: float(box["y"]))
    return [(float(box["x"]), float(box["width"])) for box in boxes]


def widths(svg, colour):
    """The widths of all bars of a colour, from top to bottom."""
    return [width for _, width in bars_of(svg, colour)]


def test_bars_are_as_long_as_their_values(svg):
    drawn = svg(bars, "title", RATIOS, "throughput", "queue")
    one = widths(drawn, POLICY_COLOURS["queue"])[0]
    assert widths(drawn, POLICY_COLOURS["queue"]) == pytest.approx([one, one], rel=1e-3)
    assert widths(drawn, POLICY_COLOURS["lend"]) == pytest.approx([1.8 * one, 1.01 * one], rel=1e-3)
    assert widths(drawn, POLICY_COLOURS["isolated"])[0] == pytest.approx(0.6 * one, rel=1e-3)


def test_bars_bear_their_names_and_values(svg):
    said = texts(svg(bars, "The title", RATIOS, "throughput", "queue"))
    for text in ("The title", "long", "short &amp; &lt;even&gt;", "throughput (queue = 1)"):
        assert said.count(text) == 1
    assert said.count("lend") == said.count("queue") == said.count("isolated") == 2
    assert [s for s in said if s == "–" or re.fullmatch(r"\d\.\d\d", s)] == [
        *("1.80", "1.00", "0.60"),
        *("1.01", "1.00", "–"),
    ]


def test_only_ratios_have_a_dashed_line_and_it_stands_at_1(svg):
    ratios = svg(bars, "title", RATIOS, "throughput", "queue")
    (dashed,) = re.findall(r'<line x1="(\S+)" \S+ x2="(\S+)" [^>]*class="mark"', ratios)
    right_end = sum(bars_of(ratios, POLICY_COLOURS["queue"])[0])
    assert [float(x) for x in dashed] == pytest.approx([right_end] * 2, abs=0.011)
    assert "stroke-dasharray" in re.search(r"\.mark {(.*?)}", ratios)[1]
    assert 'class="mark"' not in svg(bars, "title", RATIOS, "tokens/s")


def test_values_have_three_digits_or_are_integers(svg):
    values = {"a": 0.01234, "b": 5.0, "c": 99.94, "d": 99.96, "e": 183456.7}
    said = texts(svg(bars, "title", {"trace": values}, "tokens/s"))
    assert {"0.0123", "5", "99.9", "100", "183,457"} <= {*said}


def test_lines_on_logarithmic_axes_are_straight_for_powers(svg):
    drawn = svg(lines, "title", CURVES, "instances", "tokens/s", log_x=True, log_y=True)
    (line,) = lines_of(drawn, POLICY_COLOURS["lend"])
    (x0, y0), (x1, y1), (x2, y2) = line
    assert (x1 - x0, y1 - y0) == pytest.approx((x2 - x1, y2 - y1), rel=1e-3)


def test_lines_on_linear_axes_begin_at_zero(svg):
    points = [(1, 50), (2, 60), (3, 100)]
    drawn = svg(lines, "title", {"lend": points}, "x", "y")
    (line,) = lines_of(drawn, POLICY_COLOURS["lend"])
    heights = [-y for _, y in line]
    assert (heights[2] - heights[0]) / (heights[1] - heights[0]) == pytest.approx(5, rel=1e-3)
    assert "0" in texts(drawn)


def test_lines_are_named_and_ticks_are_plain_numbers(svg):
    drawn = svg(lines, "title", CURVES, "instances", "tokens/s", log_x=True, log_y=True)
    assert {"lend", "queue", "instances", "tokens/s", "1", "10", "100", "1,000"} <= {*texts(drawn)}


def test_points_without_a_place_are_left_out(svg):
    points = [(0, 5), (1, math.inf), (1, 10), (2, -3), (3, 20), (4, 30), (5, math.nan)]
    drawn = svg(lines, "title", {"lend": points, "queue": [(0, 1)]}, "x", "y", True, True)
    (line,) = lines_of(drawn, POLICY_COLOURS["lend"])
    assert len(line) == 3
    assert "queue" not in texts(drawn)


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (bars, ("title", RATIOS, "throughput", "queue")),
        (lines, ("title", CURVES, "x", "y", True, True)),
    ],
)
def test_the_same_figures_give_the_same_bytes(svg, function, args):
    drawn = svg(function, *args)
    assert svg(function, *args) == drawn
    assert "<dc:date>" not in drawn


def test_nothing_to_show_is_an_empty_plot(svg):
    assert "title" in texts(svg(bars, "title", {}, "tokens/s"))
    assert "title" in texts(svg(lines, "title", {"lend": []}, "x", "y", log_x=True))


def test_a_policy_keeps_its_colour_and_others_do_not_take_it():
    names = [*POLICY_COLOURS]
    for some in itertools.chain.from_iterable(itertools.combinations(names, k) for k in range(7)):
        colours = colours_of([*some, "ideal", "measured"])
        assert all(colours[name] == POLICY_COLOURS[name] for name in some)
        assert len({*colours.values()}) == len(some) + 2


def test_labels_are_moved_apart_in_order_and_no_further_than_needed():
    rng = random.Random(3)
    for _ in range(200):
        heights = [rng.choice((0.9, rng.random())) for _ in range(rng.randrange(8))]
        moved = spread(heights, 0.1)
        pairs = itertools.combinations(range(len(heights)), 2)
        for a, b in pairs:
            assert abs(moved[a] - moved[b]) >= 0.1 - 1e-9
            assert heights[a] == heights[b] or (moved[a] < moved[b]) == (heights[a] < heights[b])
        assert all(height <= 1 for height in moved)
    assert spread([0.9, 0.1, 0.5], 0.1) == [0.9, 0.1, 0.5]
    assert spread([0.5, 0.52], 0.1) == [0.5, 0.6]
    assert spread([0.98, 0.99], 0.1) == [0.9, 1.0]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "folder", "/proc/nothing"):
        with pytest.raises(OptionError, match=f"cannot write to the folder {path}"):
            plot_folder(str(path))
