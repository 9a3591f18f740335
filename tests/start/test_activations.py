"""The memory that is set aside for steps is enough for every step: counted tensor by tensor, on the
host, in runs with all that a step can have."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from types import SimpleNamespace

import local_network as network
import pytest
import torch
from accounting import Account
from clusters import BLOCK, options, run_cluster, shards
from local_network import Half
from local_ranks import open_local
from seeded_schedule import SeededSchedule

from hpc_distkv.comm.collective.group import Group, Rehearsal
from hpc_distkv.comm.device import Device
from hpc_distkv.control.messages.requests import LogitRules, Request, Sampling, pack_tokens
from hpc_distkv.errors import OptionError
from hpc_distkv.model.decoder import Decoder
from hpc_distkv.ranks import worker
from hpc_distkv.start import activations
from hpc_distkv.start.activations import rehearse, serve
from hpc_distkv.step import creditor, debtor, shared
from hpc_distkv.step.forward import Forward
from hpc_distkv.step.sizes import PROMPTS, LargestStep

TOKENS, ROWS = 96, 12
STEP = LargestStep(TOKENS, ROWS, BLOCK, shares=True)


class Elsewhere(Device):
    """Samples as devices do, though it is the host."""

    place = SimpleNamespace(type="elsewhere")


@pytest.fixture
def peaks(monkeypatch) -> list[int]:
    """Of all steps of all ranks, from their inputs to their tokens."""
    found: list[int] = []
    run, sample, current = Forward.run, worker.begin_sampling, threading.local()
    monkeypatch.setattr(shared, "LEAST_SAVED", BLOCK)

    def counted(self, *arguments):
        current.account = Account()
        with current.account:
            logits = run(self, *arguments)
        found.append(current.account.peak)
        return logits

    def sampled(device, logits, sequences, drawn):
        with current.account:
            begun = sample(Elsewhere(), logits, sequences, drawn)
        found.append(current.account.peak)
        return begun

    monkeypatch.setattr(Forward, "run", counted)
    monkeypatch.setattr(worker, "begin_sampling", sampled)
    return found


def needed(model: Decoder, step: LargestStep) -> int:
    """What the rehearsal takes, but for its pool."""
    with Account() as account:
        rehearse(model, Elsewhere(), step)
    blocks = -(-(step.tokens - step.rows + 1) // BLOCK)
    config = model.config
    pool = blocks * 2 * config.num_kv_heads * BLOCK * config.head_dim * model.dtype.itemsize
    return account.peak - pool


def exchanged(model: Decoder, step: LargestStep) -> int:
    return step.exchanged(model.config, model.dtype.itemsize)


def demand(rng: random.Random, rows: int, longest: int = 150) -> list[Request]:
    """Rows that begin alike, draw by all rules and ask for log-probabilities."""
    rules = LogitRules(1.2, 0.3, 0.1, ((5, 1.5),), (7,), 0.02)
    start = [rng.randrange(300) for _ in range(3 * BLOCK)]
    return [
        Request(
            number,
            pack_tokens([*start, *(rng.randrange(300) for _ in range(rng.randint(1, longest)))]),
            Sampling(20, 0.8, 0.9, seed=number, logprobs=20, rules=rules, min_tokens=3),
        )
        for number in range(rows)
    ]


@pytest.mark.parametrize(("tokens", "rows", "longest"), [(TOKENS, ROWS, 150), (16, 16, 2)])
def test_no_step_takes_more_than_the_one_that_is_rehearsed(
    whole,
    peaks,
    tokens,
    rows,
    longest,
):
    """What takes most is the layers of prompts, or what tokens are drawn from."""
    requests = demand(random.Random(0), 3 * rows, longest)
    settings = options(600, max_num_batched_tokens=tokens, max_num_seqs=rows)
    outcome = run_cluster(whole, requests, 1, settings)
    assert len(outcome.ids) == len(requests)
    assert outcome.counters[0].prompt_tokens < sum(request.prompt_len for request in requests)
    limit = needed(whole, replace(STEP, tokens=tokens, rows=rows))
    assert 0.5 * limit < max(peaks) <= limit


def test_sums_and_logits_of_an_instance_are_in_it(tiny_model, peaks, monkeypatch):
    # A thread that receives would count copies that the network makes of what is sent.
    monkeypatch.setattr(network, "Half", lambda peer, tensor, eager: Half(peer, tensor))
    models = shards(tiny_model, 2, 2)
    few = 3  # so that layers take more than logits
    rows = demand(random.Random(1), 6 * few)
    settings = options(600, max_num_batched_tokens=TOKENS, max_num_seqs=few)
    run_cluster(models, rows, 2, settings, tp=2)
    step = replace(STEP, rows=few)
    comms, hops = open_local(2, tp=2), []
    monkeypatch.setattr(Rehearsal, "_exchange", lambda *_: hops.append(1))
    models[0].lanes = group = Group(comms[0])
    limit = needed(models[0], step)
    assert models[0].lanes is group
    assert len(hops) > 2 * models[0].config.num_layers
    assert 0.5 * limit < max(peaks) <= limit


def test_what_is_exchanged_in_a_layer_is_counted(whole, monkeypatch):
    legs, visits = [], []
    begin, serve = debtor.Debtor.begin, creditor.Creditor.push

    def begun(self, *arguments):
        exchanging = begin(self, *arguments)
        tensors = [t for e in self._exchanges for t in (e.rows, e.queries, e.out, e.lse)]
        legs.append(sum(tensor.nbytes for tensor in tensors))
        return exchanging

    def pushed(self):
        served = [step for step in self._steps.values() if step.rows]
        tensors = [t for visit in served for t in (visit._queries, visit._out, visit._lse)]
        visits.append(sum(tensor.nbytes for tensor in tensors))
        return serve(self)

    monkeypatch.setattr(debtor.Debtor, "begin", begun)
    monkeypatch.setattr(creditor.Creditor, "push", pushed)
    rows = demand(random.Random(2), 6, longest=500)
    settings = options(40, max_num_batched_tokens=TOKENS, max_num_seqs=ROWS)
    run_cluster(whole, rows, 3, settings, schedule=SeededSchedule(0))
    limit = exchanged(whole, replace(STEP, others=2)) // 2
    assert 0 < max(legs) <= limit
    assert 0 < max(visits) <= limit


def test_many_others_send_decodes_and_a_few_of_them_prompts(whole):
    none, one, some, many = (
        exchanged(whole, replace(STEP, others=others)) for others in (0, 1, PROMPTS, 100)
    )
    assert none == 0
    row = one // TOKENS
    assert some == PROMPTS * one
    assert many == some + (100 - PROMPTS) * ROWS * row


def test_attention_to_guests_and_decodes_alone_can_be_rehearsed(whole):
    """On the host attention needs no partial results, but its outputs."""
    with Account() as account:
        serve(whole, Elsewhere(), STEP)
    assert account.peak > TOKENS * whole.config.num_heads * whole.config.head_dim * 4
    assert needed(whole, STEP.decodes) < needed(whole, STEP)


@pytest.mark.parametrize(
    ("others", "recorded", "stages", "parts"),
    [(0, False, False, 1), (2, False, False, 2), (2, True, False, 3), (1, True, True, 4)],
)
def test_what_runs_beside_a_step_is_added_to_it(
    whole,
    monkeypatch,
    others,
    recorded,
    stages,
    parts,
):
    monkeypatch.setattr(activations, "_measured", lambda device, part: part() or 1000)
    step = replace(STEP, others=others, recorded=recorded, stages=stages)
    counted = exchanged(whole, step) + step.tables(whole.config)
    assert activations.activation_peak(whole, Elsewhere(), step) == counted + parts * 1000


def test_no_room_for_the_largest_step_is_said_with_what_to_do(whole, monkeypatch):
    def no_room(*_: object) -> int:
        raise torch.cuda.OutOfMemoryError("2 GiB")

    monkeypatch.setattr(activations, "_measured", no_room)
    with pytest.raises(OptionError, match=r"no room for a step of 96 tokens.* --max-num-batched-t"):
        activations.activation_peak(whole, Elsewhere(), STEP)
