"""Finished runs as one HTML page that needs nothing else: no network, no files beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hpc_distkv.observe.report import charts
from hpc_distkv.observe.report.svg import WIDTH
from hpc_distkv.observe.summary.run_files import History, RunFiles, about_run
from hpc_distkv.printable import printable
from hpc_distkv.units import duration, seconds_text

MOST_FRAMES = 300
"""Moments of the debt matrix."""
MOST_MEMBERS = 24
"""Instances in it: those that owe and lend most."""
SHAPE = {
    *("ranks", "nodes", "instances", "tensor_parallel_size"),
    *("num_blocks", "block_size", "dtype"),
}
"""What is known of a run whose ranks are described."""
STYLE = (Path(__file__).with_name("page.css"), Path(__file__).with_name("page.js"))
NO_TRACE = "This needs the run's trace: give <code>--trace FILE.json</code> to the next run."
NO_METRICS = "This needs the run's metrics: give <code>--metrics FILE.json</code> to the next run."


def _text(words: str) -> str:
    return escape(printable(words))


def page(run: RunFiles) -> str:
    """The HTML of the report of a job's runs."""
    css, script = (file.read_text() for file in STYLE)
    metrics, timed = run.metrics, _timed_of(run)
    model = Path(run.about.get("model", "")).name or "a model"
    body = "".join(
        (
            f"<header><h1>{_text(model)}</h1><p>{_text(_subtitle(run.about))}</p></header>",
            _tiles(metrics),
            _runs(run.runs),
            _timed(f"Throughput{timed}", run.history, charts.throughput),
            _timed(f"KV pools{timed}", run.history, charts.pools),
            _debts(f"Who owes whom{timed}", run.history),
            _measured("Latency", metrics, charts.latencies),
            _measured(
                "Where the time goes",
                metrics,
                lambda metrics: charts.where_time_goes(metrics["ranks"]),
            ),
            _slowest(metrics),
            f"<footer>{_text(_origin(run))}</footer>",
        )
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(model)}: hpc-distkv</title>\n<style>\n{css}</style></head>\n"
        f"<body>{body}\n<script>\n{script}</script></body></html>\n"
    )


def _subtitle(about: Mapping[str, Any]) -> str:
    if not about.keys() >= SHAPE:
        return ""
    parts = [
        _moment(about),
        f"{about['ranks']} ranks on {about['nodes']} nodes"
        if about["nodes"] > 1
        else f"{about['ranks']} ranks on one node",
        f"{about['num_blocks']:,} rBlocks of {about['block_size']} tokens each",
        str(about["dtype"]),
    ]
    if about["tensor_parallel_size"] > 1:
        parts.insert(2, f"{about['instances']} instances of {about['tensor_parallel_size']}")
    if about.get("slurm_job_id"):
        parts.append(f"Slurm job {about['slurm_job_id']}")
    return " · ".join(parts)


def _timed_of(run: RunFiles) -> str:
    """Which run the charts over time show, where there are several."""
    if not run.traces or max(len(run.runs), len(run.traces)) < 2:
        return ""
    about = run.traces[-1][0]
    shard = f", shard {about['shard']}" if about.get("shard") else ""
    return f" of the run of {_moment(about)}{shard}"


def _moment(about: Mapping[str, Any]) -> str:
    return str(about.get("started", "")).replace("T", " ").replace("+00:00", " UTC")


def _tiles(metrics: Mapping[str, Any]) -> str:
    if not metrics:
        return f"<p class=missing>{NO_METRICS}</p>"
    rows, counters = metrics["request_counts"], metrics["counters"]
    latency = metrics["latency_s"]
    tiles = [
        ("rows answered", f"{rows['completed']:,}", f"{rows['failed']:,} errors"),
        (
            "output tokens/s",
            f"{metrics['output_tokens_per_second']:,.1f}",
            f"{metrics['tokens_per_second']:,.0f} with prompts",
        ),
        (
            "time",
            duration(metrics["seconds"]),
            f"{counters['generated_tokens']:,} output tokens",
        ),
        (
            "prompt tokens computed",
            f"{counters['prompt_tokens']:,}",
            f"{counters.get('cached_tokens', 0):,} of shared prefixes",
        ),
        (
            "time of a row",
            seconds_text(latency["p50"]) if latency else "–",
            f"median; p99 {seconds_text(latency['p99'])}" if latency else "",
        ),
        (
            "rBlocks lent",
            f"{counters['blocks_borrowed']:,}",
            f"{counters['blocks_returned']:,} recalled, "
            f"{counters['refused_grants']:,} grants refused",
        ),
        ("preemptions", f"{counters['preemptions']:,}", f"{counters['migrations']:,} migrations"),
    ]
    cells = "".join(
        f"<div><span>{_text(name)}</span><b>{_text(value)}</b><i>{_text(more)}</i></div>"
        for name, value, more in tiles
    )
    return f"<section class=tiles>{cells}</section>"


def _runs(runs: Sequence[Mapping[str, Any]]) -> str:
    """Each run of the job by itself, if there are several."""
    if len(runs) < 2:
        return ""
    rows = [
        (
            _moment(about_run(run)),
            _which(about_run(run)),
            duration(run["seconds"]),
            f"{run['rows']['answered']:,}",
            f"{run['rows']['failed']:,}",
            f"{run['counters']['generated_tokens']:,}",
            f"{run['output_tokens_per_second']:,.1f}",
            f"{run['counters']['preemptions']:,}",
            "rows are left" if run["stopped"] else "all rows are done",
        )
        for run in runs
    ]
    heads = (
        *("began", "run", "time", "rows answered", "errors", "output tokens", "tokens/s"),
        *("preemptions", "at its end"),
    )
    return _section(
        f"{len(runs)} runs",
        f"{_table(heads, rows)}<p class=missing>Above and below, rows are those of the job, times "
        "and counts are sums over all these runs, rates are those of one run in the mean, "
        "percentiles are right to 4 %, and the time of a rank is that of all ranks of its "
        "number.</p>",
    )


def _which(about: Mapping[str, Any]) -> str:
    """A run among those of its job, or of an array."""
    parts = [
        f"shard {about['shard']}" if about.get("shard") else "",
        f"Slurm job {about['slurm_job_id']}" if about.get("slurm_job_id") else "",
        f"restart {about['slurm_restart_count']}" if about.get("slurm_restart_count") else "",
        f"{about['ranks']} ranks" if "ranks" in about else "",
    ]
    return ", ".join(part for part in parts if part)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead>{body}</table>"


def _timed(title: str, history: History | None, chart: Any) -> str:
    drawn = chart(history) if history else f"<p class=missing>{NO_TRACE}</p>"
    return _section(title, drawn)


def _measured(title: str, metrics: Mapping[str, Any], chart: Any) -> str:
    drawn = chart(metrics) if metrics else f"<p class=missing>{NO_METRICS}</p>"
    return _section(title, drawn or "<p class=missing>No row was answered.</p>")


def _debts(title: str, history: History | None) -> str:
    if history is None:
        return _timed(title, None, None)
    totals = [sum(debts.values()) for debts in history.debts]
    if not any(totals):
        return _section(title, "<p class=missing>Nothing was lent.</p>")
    members = _members(history)
    frames = _frames(history, totals)
    first = max(range(len(frames)), key=lambda n: sum(b for _, _, b in frames[n]["debts"]))
    data = json.dumps(
        {
            "frames": frames,
            "end": float(history.seconds[-1]),
            "left": charts.LEFT,
            "right": WIDTH - charts.RIGHT,
            "most": max(b for frame in frames for _, _, b in frame["debts"]),
        }
    )
    slider = (
        f"<input id=moment type=range min=0 max={history.seconds[-1]:.3f} step=0.001 "
        f"value={frames[first]['at']} "
        'aria-label="moment of the run">'
    )
    more = ""
    if len(members) < history.instances:
        more = (
            f"<p class=missing>The {len(members)} of {history.instances} instances that lent and "
            "borrowed most.</p>"
        )
    return _section(
        title,
        f"{charts.lent(history)}{slider}<p id=caption></p>{charts.debt_matrix(members)}{more}"
        f'<script type="application/json" id=debts>{data}</script>',
    )


def _members(history: History) -> list[int]:
    weight = dict.fromkeys(range(history.instances), 0)
    for debts in history.debts:
        for pair, blocks in debts.items():
            for instance in pair:
                weight[instance] += blocks
    return sorted(sorted(weight, key=lambda i: -weight[i])[:MOST_MEMBERS])


def _frames(history: History, totals: Sequence[int]) -> list[dict[str, Any]]:
    """Moments evenly over the run, and that of the most debts."""
    samples = len(totals)
    chosen = {round(n * (samples - 1) / MOST_FRAMES) for n in range(MOST_FRAMES + 1)}
    chosen.add(max(range(samples), key=lambda n: totals[n]))
    return [
        {
            "at": round(float(history.seconds[n]), 3),
            "debts": [[d, c, blocks] for (d, c), blocks in history.debts[n].items()],
        }
        for n in sorted(chosen)
    ]


def _slowest(metrics: Mapping[str, Any]) -> str:
    if not metrics.get("slowest_rows"):
        return ""
    heads = ("custom_id", "prompt tokens", "output tokens", "first token after", "last token after")
    rows = [
        (
            row["custom_id"],
            f"{row['prompt_tokens']:,}",
            f"{row['output_tokens']:,}",
            seconds_text(row["time_to_first_token_s"]),
            seconds_text(row["latency_s"]),
        )
        for row in metrics["slowest_rows"]
    ]
    return _section("Slowest rows", _table(heads, rows))


def _origin(run: RunFiles) -> str:
    version = run.about.get("version", "")
    source = f"{run.about['input']} → {run.about.get('output')}" if "input" in run.about else ""
    parts = (f"hpc-distkv {version}", source, f"from {' and '.join(run.names)}")
    return " · ".join(part for part in parts if part)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{content}</section>"
