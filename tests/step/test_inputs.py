"""Steps with rows that are none: what recorded steps are rounded up with."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from clusters import engine_of, options, run_cluster, tiny_decoder
from late_device import be_late
from local_ranks import open_local
from seeded_schedule import SeededSchedule
from test_shared import BLOCK, DIM, HEADS, KV_HEADS, rows_of
from workloads import stopping

from hpc_distkv.attention import AttentionSpec, micro_attention, rotate_and_write
from hpc_distkv.control.messages.counters import Counters
from hpc_distkv.memory.pool import BlockPool
from hpc_distkv.memory.rmanager import RManager
from hpc_distkv.ranks import rank
from hpc_distkv.start import layout
from hpc_distkv.step.inputs import read


def test_rows_beside_rows_that_are_none_see_what_they_see_alone():
    torch.manual_seed(0)
    rm, pool = RManager(0, 100), BlockPool(101, 1, KV_HEADS, BLOCK, DIM, torch.float32)
    for slot in range(101):
        pool.rblock(slot).normal_()
    rows = rows_of(rm)
    inputs = read(rm, rows, BLOCK)
    more = inputs.padded(len(rows) + 3, slot=100)
    tokens = len(inputs.tokens)
    assert (more.blocks[tokens:] == 100).all()
    assert torch.equal(more.ends, inputs.ends)
    for part, whole in zip(inputs[:-1], more[:-1], strict=True):
        assert torch.equal(part, whole[: len(part)])
    q = torch.randn(tokens + 3, HEADS, DIM)
    cache = pool.layer(0)
    alone, _ = micro_attention(q[:tokens], *cache, inputs.batch, AttentionSpec(0.3), causal=True)
    beside, _ = micro_attention(q, *cache, more.batch, AttentionSpec(0.3), causal=True)
    assert torch.equal(beside[:tokens], alone)
    assert not beside[tokens:].any()


class Replayed:
    """Runs steps as `DecodeGraphs` does, but for recording them."""

    steps = 0

    def __init__(self, model, pool: BlockPool) -> None:
        self._model, self._pool = model, pool

    def padded(self, inputs):
        return inputs.padded(len(inputs.tokens) + 3, self._pool.num_blocks - 1)

    def hidden(self, batch, inputs):
        tokens, positions, blocks, offsets = inputs
        Replayed.steps += 1
        if Replayed.steps % 3 == 0:
            return None

        def attend(layer, qk, v, rotation):
            cache = self._pool.layer(layer)
            q = rotate_and_write(qk, v, rotation, *cache, blocks, offsets)
            return micro_attention(q, *cache, batch, self._model.attention[layer], causal=True)[0]

        return self._model.hidden(tokens, positions, attend, lambda: None, None)


@pytest.mark.parametrize("seed", range(2))
def test_steps_that_are_rounded_up_change_no_token(monkeypatch, seed):
    model, rows = tiny_decoder(), stopping(30, random.Random(seed))
    want = run_cluster(model, rows, 1, options(4000)).tokens
    monkeypatch.setattr(layout, "recordable", lambda *_: True)
    monkeypatch.setattr(rank, "decode_graphs", lambda model, pool, *_: Replayed(model, pool))
    schedule = SeededSchedule(seed)
    assert run_cluster(model, rows, 1, options(200), schedule, prepare=be_late).tokens == want
    assert Replayed.steps > 10


def test_recorded_steps_serve_all_runs_of_an_engine(monkeypatch):
    """Else those of a run before keep their memory for as long as anybody has its worker."""
    made, used = [], []
    (comm,) = open_local(1)
    monkeypatch.setattr(rank, "decode_graphs", lambda *_: made.append(object()) or made[-1])
    monkeypatch.setattr(rank, "Worker", lambda parts, *_: used.append(parts) or Ended())
    engine = engine_of(comm, tiny_decoder(), options(10))
    for _ in range(2):
        engine.run()
    assert [parts.graphs for parts in used] == made * 2


class Ended:
    """The worker of a run without rows."""

    instance = SimpleNamespace(counters=Counters())

    def run(self) -> None:
        pass
