"""Recorded decode steps have the tokens of steps as they are, on one rank and on the ranks of an
instance. A CPU stands for the GPU: to replay a step is to compute it again, from the tensors that
it was recorded with, into those that it left its result in."""

from __future__ import annotations

import random
from dataclasses import fields

import pytest
import torch
from clusters import BLOCK, VOCABULARY, Outcome, options, request, run_cluster, shards
from late_device import be_late
from recorded_fabric import connect
from seeded_schedule import SeededSchedule
from torch.nn.functional import pad

from hpc_distkv.attention import PagedBatch, reference
from hpc_distkv.attention.paged import Call
from hpc_distkv.attention.reference import rotate
from hpc_distkv.attention.triton import backend as launch
from hpc_distkv.attention.triton.launch_plan import plan_key
from hpc_distkv.comm.transport import Comm
from hpc_distkv.control.messages.requests import Request, Sampling, pack_tokens
from hpc_distkv.model.decoder import Decoder
from hpc_distkv.start import layout
from hpc_distkv.step import graphs
from hpc_distkv.step.forward import Forward
from hpc_distkv.step.graphs import DecodeGraph

REPLAYED: list[tuple[int, Decoder]] = []
"""Each step that was replayed: its rows, and the rank's model."""


class Plan:
    """The numbers of a batch, in tensors that can be filled anew."""

    def __init__(self, batch: PagedBatch) -> None:
        self.numbers = {field.name: getattr(batch, field.name) for field in fields(batch)}

    @property
    def form(self) -> tuple[int, int]:
        return self.numbers["kv_len"].numel(), self._room.bit_length()

    def roomy(self) -> Plan:
        plan = Plan.__new__(Plan)
        more = (1 << self._room.bit_length()) - self._room
        plan.numbers = {
            name: pad(tensor, (0, more)) if name in ("blocks", "first_token") else tensor.clone()
            for name, tensor in self.numbers.items()
        }
        return plan

    def take(self, other: Plan) -> None:
        for name, tensor in other.numbers.items():
            self.numbers[name][: len(tensor)].copy_(tensor)

    def batch(self) -> PagedBatch:
        count = int(self.numbers["block_start"][-1])
        lists = {name: self.numbers[name][:count] for name in ("blocks", "first_token")}
        return PagedBatch(**(self.numbers | lists))

    @property
    def _room(self) -> int:
        return self.numbers["blocks"].numel()


class Kernels:
    """Attention by plans, as on a GPU."""

    merge_rows = staticmethod(reference.merge_rows)

    def serves(self, *_: object) -> bool:
        return True

    def plan(self, q, k_cache, batch, spec, *, causal) -> Plan:
        key = plan_key(q, k_cache, spec, causal=causal)
        return batch.derived(key, lambda: Plan(batch))

    def micro_attention(self, call: Call) -> None:
        plan = self.plan(call.q, call.k_cache, call.batch, call.spec, causal=call.causal)
        reference.micro_attention(call._replace(batch=plan.batch()))

    def rotate_and_write(self, qk, v, rotation, k_cache, v_cache, blocks, offsets) -> torch.Tensor:
        qk, heads = rotate(qk, rotation), qk.shape[1] - v.shape[1]
        reference.write_kv(qk[:, heads:], v, k_cache, v_cache, blocks, offsets)
        return qk[:, :heads]


class Again:
    """Stands for a CUDA graph."""

    step: DecodeGraph | None = None

    def replay(self) -> None:
        REPLAYED.append((len(self.step._hidden), self.step._model))
        with self.step._model.lanes.recording(self):
            self.step._hidden.copy_(self.step.compute())

    def reset(self) -> None:
        self.step = None


def record(step: DecodeGraph, stream: object, memory: object) -> None:
    step._graph.step = step
    with step._model.lanes.recording(step._graph):
        step._hidden = step.compute()


@pytest.fixture(autouse=True)
def again(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Kernels()
    monkeypatch.setattr(launch, "kernels", lambda device: kernels)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Again)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(graphs, "new_stream", object)
    monkeypatch.setattr(DecodeGraph, "record", record)
    monkeypatch.setattr(layout, "recordable", lambda model, q, k_cache: model.capturable)
    REPLAYED.clear()


def late_and_connected(comms: list[Comm]) -> None:
    connect(comms)
    be_late(comms)


def rows_of(count: int, rng: random.Random) -> list[Request]:
    """Rows of which some may end at any token."""
    rows = []
    for number in range(count):
        prompt = pack_tokens([rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 40))])
        stop = tuple(rng.sample(range(VOCABULARY), 8)) if number % 2 else ()
        rows.append(Request(number, prompt, Sampling(rng.randint(2, 40), stop_token_ids=stop)))
    return rows


def answers(
    model: Decoder | dict, rows: list[Request], ranks: int, tp: int, blocks: int, seed: int
) -> Outcome:
    schedule = SeededSchedule(seed)
    return run_cluster(
        model, rows, ranks, options(blocks), schedule, tp=tp, prepare=late_and_connected
    )


def as_they_are(model: Decoder, rows: list[Request]) -> dict[int, list[int]]:
    return run_cluster(model, rows, 1, options(4000, enforce_eager=True)).tokens


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_recorded_steps_change_no_token(tiny_model, whole, tp, seed):
    rows = rows_of(16, random.Random(seed))
    found = answers(shards(tiny_model, tp, tp), rows, tp, tp, 300, seed)
    assert len(REPLAYED) > 10 * tp
    assert len({rows for rows, _ in REPLAYED}) > 1
    assert found.tokens == as_they_are(whole, rows)


@pytest.mark.parametrize("seed", range(2))
def test_steps_of_creditors_of_several_ranks_are_not_replayed(
    tiny_model,
    whole,
    monkeypatch,
    seed,
):
    """Debtors would wait for them in every layer."""
    rng, steps = random.Random(seed), []
    rows = rows_of(10, rng)
    rows.append(request(len(rows), 30 * BLOCK, 16, rng))
    run = Forward.run

    def watched(forward: Forward, *arguments: object) -> torch.Tensor:
        guests, before = bool(forward._rm.lender.guests), len(REPLAYED)
        result = run(forward, *arguments)
        models = [model for _, model in REPLAYED[before:]]
        steps.append((guests, forward._model in models))
        return result

    monkeypatch.setattr(Forward, "run", watched)
    found = answers(shards(tiny_model, 4, 2), rows, 4, 2, 24, seed)
    assert {(True, False), (False, True)} <= set(steps)
    assert (True, True) not in steps
    assert found.tokens == as_they_are(whole, rows)
