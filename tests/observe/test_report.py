"""The report of a run: what it is drawn from, and how it looks in a real browser."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from seen_runs import snapshot, two_ranks

from hpc_distkv.comm.world import World
from hpc_distkv.control.messages.counters import Counters
from hpc_distkv.control.messages.requests import Result, pack_tokens
from hpc_distkv.observe.report.page import page
from hpc_distkv.observe.report.svg import clock, nice_ticks, time_step
from hpc_distkv.observe.summary.metrics import total, write_json
from hpc_distkv.observe.summary.run import RunRecord
from hpc_distkv.observe.summary.run_files import RunFileError, read_run
from hpc_distkv.observe.trace.spans import DTYPE, RankSpans
from hpc_distkv.observe.trace.trace_file import write_trace

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
NAMES = ["</script><b>row", "row & more", "\u202erow\x1b[31m", *(f"row {n}" for n in range(30))]


def write_run(folder: Path, instances: int = 2, number: str = "", **about: object) -> Path:
    """Metrics and trace of a run on so many ranks; `number`: in the names of its files."""
    rng = np.random.default_rng(4)
    about = {"model": "models/Tiny-1B", **about}
    if instances == 2:
        write_trace(folder / f"trace{number}.json", *two_ranks(), 0.0, about)
    else:
        timeline = [
            snapshot(
                float(second),
                rng.integers(0, 101, instances).tolist(),
                [0] * instances,
                [(d, d + 1, int(rng.integers(1, 1000))) for d in range(instances - 1)],
            )
            for second in range(0, 40_000, 400)
        ]
        world = World(0, (0,) * instances)
        ranks = [RankSpans(np.zeros(0, DTYPE), 1, 0.0)] * instances
        write_trace(folder / "trace.json", world, ranks, timeline, 0.0, {"model": "m"})
    record = RunRecord()
    for n, name in enumerate(NAMES):
        latency = float(rng.lognormal(1, 1.5))
        record.add([Result(n, pack_tokens([1]), "stop", latency / 3, latency)], name, 1000 * n)
    gaps = {int(at): 5 for at in rng.integers(-90, -40, 30)}
    counters = [
        Counters(compute_time=20.0 + n, partial_wait=4.0, control_wait=9.0, gaps=gaps)
        for n in range(instances)
    ]
    ranks = [
        {"rank": n, "counters": {k: v for k, v in total([c]).items() if k != "gaps"}}
        for n, c in enumerate(counters)
    ]
    figures = {
        "request_counts": {"total": 33, "completed": 32, "failed": 1},
        "rows": {"answered": 32, "failed": 1},
        "stopped": False,
        "job": about,
        "ranks": ranks,
    }
    write_json(folder / f"metrics{number}.json", figures | record.summary(counters, []))
    return folder


def test_a_history_is_what_the_run_was(tmp_path):
    _, _, timeline = two_ranks()
    history = read_run([write_run(tmp_path)]).history
    assert history.seconds.tolist() == [0.0, 1.0, 2.0]
    assert history.own.tolist() == [[20, 90, 0], [10, 10, 0]]
    assert history.hosted.tolist() == [[0, 0, 0], [0, 6, 0]]
    assert history.capacity.tolist() == [100, 100]
    assert history.debts == [{}, {(0, 1): 6}, {}]
    for column in ("prompt_tokens", "generated_tokens", "running"):
        expected = np.array([getattr(now, column) for now in timeline]).T
        assert getattr(history, column).tolist() == expected.tolist()


def test_a_page_needs_nothing_else(tmp_path):
    html = page(read_run([write_run(tmp_path)]))
    assert not re.search(r"https?://|src=|<link|@import|url\(", html)
    assert html.count("<svg") == 6
    assert "<b>row" not in html
    assert "row &amp; more" in html
    assert r"\u202erow\x1b[31m" in html


@pytest.mark.parametrize(("left_out", "missing"), [("metrics.json", 3), ("trace.json", 3)])
def test_one_of_the_two_files_is_enough_for_a_part(tmp_path, left_out, missing):
    (write_run(tmp_path) / left_out).unlink()
    html = page(read_run([tmp_path]))
    assert html.count("<p class=missing>This needs") == missing
    assert "<svg" in html


BAD_FILES = {
    "nothing there": ({}, "no metrics or trace"),
    "no JSON": ({"a.json": "{"}, "cannot read"),
    "another's trace": ({"a.json": '{"traceEvents": []}'}, "no metrics or trace"),
    "metrics of another version": (
        {"a.json": '{"request_counts": {}, "counters": {}}'},
        "another version wrote it",
    ),
    "two traces": ({"b.json": "trace.json", "trace.json": "trace.json"}, "second trace"),
    "a trace without its tokens": (
        {"a.json": '{"traceEvents": [{"ph": "C"}], "otherData": {"format": "hpc-distkv trace 1"}}'},
        "is no trace of",
    ),
}


@pytest.mark.parametrize("bad", BAD_FILES)
def test_files_of_no_run_are_refused_by_name(tmp_path, bad):
    files, said = BAD_FILES[bad]
    source, folder = tmp_path / "run", tmp_path / "folder"
    source.mkdir()
    folder.mkdir()
    write_run(source)
    for name, content in files.items():
        whole = (source / content).read_text() if content == "trace.json" else content
        (folder / name).write_text(whole)
    with pytest.raises(RunFileError, match=said):
        read_run([folder])


def test_what_else_lies_in_a_folder_is_passed_over(tmp_path):
    """What cannot be read is named, since it may be of the run."""
    write_run(tmp_path)
    others = {
        "array.json": "[]",
        "torn.json": "{",
        "batch.json": '{"object": "batch", "request_counts": {"total": 5}}',
        "packed.json.gz": "not compressed",
    }
    for name, content in others.items():
        (tmp_path / name).write_text(content)
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    run = read_run([tmp_path])
    assert run.names == ["metrics.json", "trace.json"]
    named = ["batch", "folder", "packed", "pipe", "torn"]
    assert [name for name in (*named, "array") if f"/{name}.json" in str(run.unread)] == named
    for name in others:
        with pytest.raises(RunFileError, match=name):
            read_run([tmp_path / "metrics.json", tmp_path / name])


def places(value: object, *path: str | int) -> list[tuple]:
    """Of all values in JSON."""
    if not isinstance(value, dict | list):
        return [path]
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    return [path] * bool(path) + [p for key, each in inner for p in places(each, *path, key)]


def replaced(content: dict, path: tuple, value: object) -> dict:
    changed = json.loads(json.dumps(content))
    place = changed
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return changed


@pytest.mark.parametrize("wrong", [None, "x", [], {}, -1, math.nan], ids=repr)
def test_figures_of_another_shape_are_shown_or_refused(tmp_path, wrong):
    """Whatever of a file is missing or of another type: a page or one sentence."""
    about = {"ranks": 2, "nodes": 1, "num_blocks": 9, "output": "out", "started": "2026"}
    path = write_run(tmp_path, **about) / "metrics.json"
    earlier = write_run(tmp_path, number=".1", output="out", started="2025") / "metrics.1.json"
    content = json.loads(path.read_text())
    content["slowest_rows"] = content["slowest_rows"][:1]
    content["ranks"] = content["ranks"][:1]
    content["histograms"] = {name: bins[:1] for name, bins in content["histograms"].items()}
    shown = refused = 0
    for place in places(content):
        path.write_text(json.dumps(replaced(content, place, wrong)))
        try:
            shown += "<svg" in page(read_run([earlier, path]))
        except RunFileError as error:
            refused += str(path) in str(error)
    assert shown + refused == len(places(content))
    assert min(refused, shown) > 0


def test_a_named_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("[]")
    with pytest.raises(RunFileError, match="neither a metrics file nor a trace"):
        read_run([path])


@pytest.mark.parametrize("most", [0.003, 0.7, 1, 9.99, 10, 128, 99_999, 3e7])
def test_ticks_are_round_numbers_up_to_the_largest_value(most):
    ticks = nice_ticks(most)
    assert ticks[0] == 0
    assert ticks[-2] < most <= ticks[-1] * 1.001
    assert 2 <= len(ticks) <= 5
    assert f"{ticks[1]:.0e}"[0] in "125"


@pytest.mark.parametrize("seconds", [0.5, 41.6, 170, 3600, 16_000, 43_200, 400_000])
def test_moments_on_an_axis_are_round_and_few(seconds):
    step = time_step(seconds)
    assert seconds / step <= 8
    labels = [clock(n * step, step) for n in range(int(seconds / step) + 1)]
    assert len(set(labels)) == len(labels)


CHECK = """
<script>
const wrong = [];
for (const svg of document.querySelectorAll("svg")) {
  const boxes = [...svg.querySelectorAll("text")].filter((t) => t.textContent)
    .map((t) => ({ words: t.textContent, box: t.getBBox() }));
  const { width, height } = svg.viewBox.baseVal;
  boxes.forEach(({ words, box }, n) => {
    if (box.x < 0 || box.y < 0 || box.x + box.width > width || box.y + box.height > height)
      wrong.push(`cut off: ${words}`);
    for (const other of boxes.slice(n + 1)) {
      const b = other.box;
      if (box.x < b.x + b.width && b.x < box.x + box.width
          && box.y + 3 < b.y + b.height && b.y + 3 < box.y + box.height)
        wrong.push(`${words} over ${other.words}`);
    }
  });
}
const found = document.createElement("pre");
found.id = "found";
const filled = [...document.querySelectorAll("[id^=c]")]
  .filter((cell) => Number(cell.getAttribute("fill-opacity")) > 0).map((cell) => cell.id);
found.textContent = JSON.stringify({ wrong, filled, caption: caption.textContent });
document.body.append(found);
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium (apt-get install chromium)")
@pytest.mark.parametrize("instances", [2, 40])
def test_a_browser_shows_words_that_can_be_read_and_the_moment_of_most_debts(tmp_path, instances):
    """No word is cut off or covers another, and the script has filled the debt matrix."""
    path = tmp_path / "report.html"
    html = page(read_run([write_run(tmp_path, instances)]))
    path.write_text(html.replace("</body>", CHECK))
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/u"),
        *("--window-size=1040,2400", "--virtual-time-budget=2000", "--dump-dom", path.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout)
    assert found, done.stderr
    seen = json.loads(found[1].replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))
    assert seen["wrong"] == []
    if instances == 2:
        assert seen["filled"] == ["c0-1"]
        assert seen["caption"] == "After 1.0 s: 6 rBlocks between 1 pair"
    else:
        assert len(seen["filled"]) > 10
