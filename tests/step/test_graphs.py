"""Which forms of decode steps are recorded, replayed and forgotten. What is recorded is right:
`test_cuda.py`."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from hpc_distkv.attention import PagedBatch, PagedRow
from hpc_distkv.model.shard import Alone
from hpc_distkv.step import graphs
from hpc_distkv.step.graphs import RECORDED_AFTER, DecodeGraph, DecodeGraphs
from hpc_distkv.step.inputs import Inputs

DONE: list[str] = []


class Recorded:
    """What a form's graph is asked for."""

    def __init__(self, model: object, pool: object, rows: int, plans: dict) -> None:
        self.plans, self.batch, self.rows = plans, PagedBatch.build([]), rows
        self.inputs: list[torch.Tensor] = []

    def fill(self, inputs: list[torch.Tensor], plans: dict) -> None:
        assert len(inputs) == 4
        self.inputs = inputs

    def compute(self) -> torch.Tensor:
        DONE.append("compute")
        return torch.arange(self.rows)

    def record(self, stream: object, memory: object) -> None:
        DONE.append("record")

    def replay(self) -> torch.Tensor:
        DONE.append("replay")
        return torch.arange(self.rows)


@pytest.fixture
def table(monkeypatch) -> DecodeGraphs:
    """Of three graphs; a step's form is the number of its rows."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(graphs, "new_stream", object)
    monkeypatch.setattr(graphs, "DecodeGraph", Recorded)
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 3)
    DONE.clear()
    kernels = SimpleNamespace(plan=lambda q, *_, **__: SimpleNamespace(form=len(q)))
    cache = torch.zeros(2, 1, 4, 4)
    pool = SimpleNamespace(
        num_blocks=2, dtype=cache.dtype, device=cache.device, layer=lambda _: (cache, cache)
    )
    model = SimpleNamespace(attention=[SimpleNamespace(window=0)])
    return DecodeGraphs(model, pool, kernels, (1, 4))


def step(table: DecodeGraphs, rows: int) -> str:
    """What a step of so many rows did."""
    DONE.clear()
    numbers = torch.arange(rows)
    batch = PagedBatch.build([PagedRow(1, 0, [0], [0], 1)] * rows)
    given = Inputs(numbers, numbers, numbers, numbers.int(), numbers.int(), batch)
    padded = table.padded(given)
    inputs = [padded.tokens, padded.positions, padded.blocks, padded.offsets]
    hidden = table.hidden(padded.batch, inputs)
    assert (hidden is None) == (not DONE)
    assert hidden is None or len(hidden) == len(padded.tokens)
    return "+".join(DONE) or "as it is"


FIRST = ["as it is"] * RECORDED_AFTER + ["compute+record"]


def test_a_form_is_recorded_when_it_has_come_often_and_replayed_from_then_on(table):
    assert [step(table, 2) for _ in range(6)] == [*FIRST, "replay", "replay", "replay"]
    assert step(table, 1) == "as it is"


def test_the_least_recently_used_form_makes_place(table):
    for rows in (1, 2, 4):
        assert [step(table, rows) for _ in range(3)] == FIRST
    assert step(table, 1) == "replay"
    dropped = weakref.ref(table._graphs[2, 2])
    assert [step(table, 8) for _ in range(3)] == FIRST
    assert dropped() is None, "nothing holds its memory"
    assert [step(table, rows) for rows in (1, 4, 8)] == ["replay"] * 3
    assert [step(table, 2) for _ in range(4)] == [*FIRST, "replay"]
    assert step(table, 1) == "as it is"


def test_where_a_form_cannot_be_recorded_others_go_on_and_no_new_ones_are(
    table, monkeypatch, caplog
):
    assert [step(table, 1) for _ in range(3)] == FIRST

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(Recorded, "record", out_of_memory)
        assert [step(table, 2) for _ in range(3)] == [*["as it is"] * RECORDED_AFTER, "compute"]
    assert [step(table, 2) for _ in range(4)] == ["as it is"] * 4
    assert step(table, 1) == "replay"
    (said,) = caplog.messages
    assert "no room" in said


def test_steps_of_as_many_rows_up_to_rounding_share_a_form(table):
    assert [step(table, rows) for rows in (3, 4, 3)] == FIRST
    assert step(table, 4) == "replay"


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_collected_while_a_step_is_recorded(monkeypatch, fails):
    """Else graphs of an earlier run may be destroyed then, which CUDA forbids."""
    collecting = []

    def compute() -> torch.Tensor:
        collecting.append(gc.isenabled())
        if fails:
            raise RuntimeError("out of memory")
        return torch.zeros(1)

    graph = SimpleNamespace(
        capture_begin=lambda **_: collecting.append(gc.isenabled()),
        capture_end=lambda: collecting.append(gc.isenabled()),
    )
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", object)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    model = SimpleNamespace(lanes=Alone())
    step = SimpleNamespace(compute=compute, _graph=graph, _model=model)
    with pytest.raises(RuntimeError) if fails else nullcontext():
        DecodeGraph.record(step, stream, (0, 1))
    assert collecting == [False] * 3
    assert gc.isenabled()
