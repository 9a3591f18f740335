"""Runs that are the same on every machine."""

from __future__ import annotations

import pytest

from hpc_distkv.engine.pace import Pace, StepSeconds, StepWork


@pytest.fixture
def steady_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is taken to last as long as its work says, so that with a seeded schedule a whole
    run depends on its seed alone."""
    note = Pace.note

    def by_work(self: Pace, work: StepWork, seconds: StepSeconds) -> None:
        total = 1e-2 + 1e-3 * work.decodes + 1e-6 * work.kv_tokens + 1e-3 * work.prompt_work
        note(self, work, StepSeconds(total, 1e-3 * work.exchanging, 0.0))

    monkeypatch.setattr(Pace, "note", by_work)
