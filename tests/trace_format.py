"""Whether a trace is what Perfetto and chrome://tracing read."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest


def check_schema(content: dict[str, Any]) -> None:
    """What https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU asks
    for, as far as this file uses it: JSON object format, phases X, C and M, and complete events of
    a thread that are nested or apart."""
    assert content["displayTimeUnit"] in ("ms", "ns")
    named, threads = {"process_name": set(), "thread_name": set()}, defaultdict(list)
    for event in content["traceEvents"]:
        assert {"ph", "name", "pid", "tid", "args"} <= event.keys()
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert min(event["pid"], event["tid"]) > 0  # 0 is special in Perfetto
        assert event["ph"] == "M" or event["ts"] >= 0  # and negative times are refused
        match event["ph"]:
            case "X":
                assert event["dur"] >= 0
                begin, end = round(1e3 * event["ts"]), round(1e3 * (event["ts"] + event["dur"]))
                threads[event["pid"], event["tid"]].append((begin, -end))
            case "C":
                assert event["args"]
                assert all(isinstance(v, int | float) for v in event["args"].values())
            case "M":
                if event["name"] in named:
                    assert isinstance(event["args"]["name"], str)
                    key = (
                        (event["pid"], event["tid"]) if "thread" in event["name"] else event["pid"]
                    )
                    named[event["name"]].add(key)
                else:
                    assert event["name"] in ("process_sort_index", "thread_sort_index")
                    assert isinstance(event["args"]["sort_index"], int)
            case other:
                pytest.fail(f"phase {other}")
    assert set(threads) <= named["thread_name"]
    assert {pid for pid, _ in threads} <= named["process_name"]
    for spans in threads.values():
        open_until = []
        for begin, end in sorted(spans):
            while open_until and open_until[-1] <= begin:
                open_until.pop()
            assert not open_until or -end <= open_until[-1]
            open_until.append(-end)
