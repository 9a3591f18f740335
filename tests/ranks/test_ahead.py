"""Steps that are planned while a device computes the ones before: the tokens of steps one by one,
and nothing that is in use is freed."""

from __future__ import annotations

import random

import msgspec
import pytest
from clusters import (
    BLOCK,
    VOCABULARY,
    Countdown,
    Outcome,
    demand_of,
    options,
    request,
    run_cluster,
    shards,
    unconstrained,
)
from families import continuation, save
from families import prompt as tokens_of
from late_device import be_late
from recorded_fabric import connect
from seeded_schedule import SeededSchedule
from workloads import Letters, check_same, document_rows, sampled_rows, stopping, windowed_rows

from hpc_distkv.comm.transport import Comm
from hpc_distkv.control.messages.requests import Request, Sampling, pack_tokens
from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.decide.instance import Instance
from hpc_distkv.model import build
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.decoder import Decoder
from hpc_distkv.model.weights import load_decoder
from hpc_distkv.ranks.loop import LaunchedStep, StepLoop
from hpc_distkv.ranks.rank import EngineOptions

UNCOUNTED = {"frequency_penalty": 0.0, "presence_penalty": 0.0}


def late_and_connected(comms: list[Comm]) -> None:
    """Devices that are late over a fabric that needs both sides at once."""
    connect(comms)
    be_late(comms)


class Watch:
    """Sees how steps overlap, and what they use until the device is done with them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps = self.ahead = self.vain = self.exchanging = self.serving = 0
        self._slots: dict[int, set[int]] = {}
        compute, learn, plan = StepLoop._compute, StepLoop._learn, Instance.plan

        def watched_plan(instance: Instance, ahead: bool = False):
            made = plan(instance, ahead)
            self.steps += bool(made.scheduled)
            self.ahead += ahead and bool(made.scheduled)
            return made

        def watched_compute(loop: StepLoop, plan, now, drawn=None):
            step = compute(loop, plan, now, drawn)
            self.exchanging += drawn is not None and loop._exchanging
            self.serving += drawn is not None and bool(loop.instance.rm.lender.guests)
            self._slots[id(step)] = held(loop.instance, step)
            return step

        def watched_learn(loop: StepLoop, step: LaunchedStep, following=()):
            assert self._slots.pop(id(step)) <= held(loop.instance, step)
            self.vain += len(loop.instance._over)
            learn(loop, step, following)

        monkeypatch.setattr(Instance, "plan", watched_plan)
        monkeypatch.setattr(StepLoop, "_compute", watched_compute)
        monkeypatch.setattr(StepLoop, "_learn", watched_learn)


def held(instance: Instance, step: LaunchedStep) -> set[int]:
    """The slots that the step's rows have at home: they must stay theirs until it is over."""
    rows = [sequence.id for sequence, _ in step.plan.scheduled]
    moved = {(move.key, move.slot) for move in step.plan.moves}
    return {
        slot
        for row in rows
        for key, table in instance.rm.parts(row).items()
        for slot in table.slots
        if (key, slot) not in moved
    }


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def late(
    model: Decoder, rows: list[Request], ranks: int, settings: EngineOptions, seed: int, **others
) -> Outcome:
    return run_cluster(
        model, rows, ranks, settings, SeededSchedule(seed), prepare=be_late, **others
    )


@pytest.mark.parametrize("at_once", [False, True])
def test_models_with_experts_go_ahead(at_once, watch, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "grouped", lambda *_: at_once)
    transformer = save("qwen3-moe", tmp_path)
    model = load_decoder(tmp_path, ModelConfig.from_dir(tmp_path), "float32")
    prompts = [tokens_of(length, seed) for seed, length in enumerate([60, 9, 31])]
    rows = [
        Request(number, pack_tokens(ids), Sampling(12, 0.0)) for number, ids in enumerate(prompts)
    ]
    outcome = late(model, rows, 1, options(200), 0)
    want = {number: continuation(transformer, ids, 12) for number, ids in enumerate(prompts)}
    assert outcome.tokens == want
    assert watch.ahead > watch.steps / 2


@pytest.mark.parametrize("seed", range(4))
def test_rows_end_where_they_end_step_by_step(model, watch, seed):
    rows = stopping(40, random.Random(seed))
    outcome = late(model, rows, 1, options(200), seed)
    assert watch.ahead > watch.steps / 2
    assert watch.vain > 5, "rows that end are in the next step already"
    check_same(outcome, run_cluster(model, rows, 1, options(4000)), rows)
    made = sum(len(tokens) for tokens in outcome.tokens.values())
    assert sum(c.generated_tokens for c in outcome.counters) == made


@pytest.mark.parametrize("seed", range(3))
def test_where_memory_is_short_rows_are_preempted_between_steps(model, watch, seed):
    rng = random.Random(seed)
    rows = [request(number, rng.randint(1, 40), 80, rng) for number in range(30)]
    most = tuple(range(0, VOCABULARY, 2))
    for row, stop in enumerate([most] * 10):  # So short outputs are expected of the others.
        sampling = msgspec.structs.replace(rows[row].sampling, stop_token_ids=stop)
        rows[row] = msgspec.structs.replace(rows[row], sampling=sampling)
    outcome = late(model, rows, 1, options(40), seed)
    assert outcome.tokens == unconstrained(model, rows)
    assert sum(counters.preemptions for counters in outcome.counters) > 0
    assert 0 < watch.ahead < watch.steps


@pytest.mark.parametrize("policy", ["lend", "lend-greedy", "migrate", "queue"])
@pytest.mark.parametrize("seed", range(2))
def test_ranks_that_lend(model, watch, policy, seed):
    rng = random.Random(seed)
    rows = demand_of(3, 24 * BLOCK, rng)
    if policy.startswith("lend"):
        rows.append(request(len(rows), 30 * BLOCK, 20, rng))
    outcome = late(model, rows, 2, options(24, policy=policy), seed)
    assert outcome.tokens == unconstrained(model, rows)
    assert (watch.ahead == 0) == (policy == "migrate")
    borrowed = sum(counters.blocks_borrowed for counters in outcome.counters)
    lending = policy.startswith("lend")
    assert (borrowed > 0) == (watch.exchanging > 0) == (watch.serving > 0) == lending


@pytest.mark.parametrize("prepare", [be_late, late_and_connected])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("tp", [2, 4])
def test_lanes_go_ahead_alike(tiny_model, watch, tp, seed, prepare):
    """What rank 0 draws is on all ranks before the host knows it."""
    rows = stopping(24, random.Random(seed))
    models = shards(tiny_model, tp, tp)
    outcome = run_cluster(
        models, rows, tp, options(200), SeededSchedule(seed), tp=tp, prepare=prepare
    )
    assert watch.ahead > watch.steps / 2
    assert watch.vain > 5
    check_same(outcome, run_cluster(models, rows, tp, options(4000), tp=tp), rows)


@pytest.mark.parametrize("prepare", [be_late, late_and_connected])
@pytest.mark.parametrize("seed", range(3))
def test_instances_of_several_ranks_that_lend(
    tiny_model,
    whole,
    watch,
    seed,
    prepare,
):
    rng = random.Random(seed)
    rows = [*demand_of(3, 24 * BLOCK, rng)]
    rows.append(request(len(rows), 30 * BLOCK, 20, rng))
    outcome = run_cluster(
        shards(tiny_model, 4, 2),
        rows,
        4,
        options(24),
        SeededSchedule(seed),
        tp=2,
        prepare=prepare,
    )
    assert outcome.tokens == unconstrained(whole, rows)
    assert watch.exchanging > 0


@pytest.mark.parametrize("seed", range(3))
def test_rows_with_all_sampling_fields(model, watch, seed):
    rows = sampled_rows(24, 60, random.Random(seed))
    for row in rows[8:]:
        if row.sampling.rules:  # These penalties count tokens that are known.
            rules = msgspec.structs.replace(row.sampling.rules, **UNCOUNTED)
            sampling = msgspec.structs.replace(row.sampling, rules=rules)
            rows[row.id] = msgspec.structs.replace(row, sampling=sampling)
    outcome = late(model, rows, 1, options(80), seed, decoder=Letters())
    check_same(outcome, run_cluster(model, rows, 1, options(4000), decoder=Letters()), rows)
    assert watch.ahead > 0


@pytest.mark.parametrize("seed", range(2))
def test_rows_that_share_their_beginning(model, watch, seed):
    rows = document_rows(3, 12, random.Random(seed))
    outcome = late(model, rows, 1, options(60), seed)
    assert outcome.tokens == unconstrained(model, rows)
    assert sum(counters.cached_tokens for counters in outcome.counters) > 0
    assert watch.ahead > 0


def test_rows_with_windows_go_step_by_step(windowed_model, watch):
    rows = windowed_rows(0, 30 * BLOCK)
    outcome = late(windowed_model, rows, 1, options(60), 0)
    assert outcome.tokens == unconstrained(windowed_model, rows)
    assert watch.ahead == 0


@pytest.mark.parametrize("seed", range(2))
def test_a_run_that_is_stopped_leaves_tokens_that_are_known(model, seed):

    rng = random.Random(seed)
    rows = demand_of(2, 60 * BLOCK, rng)
    want = unconstrained(model, rows)
    left, stops = {row.id: row for row in rows}, 0
    while left:
        interrupts = {0: Countdown(at=rng.randint(8, 20), grace=rng.choice([0, 5]))}
        outcome = late(
            model,
            list(left.values()),
            1,
            options(60),
            seed,
            interrupts=interrupts if stops < 4 else {},
        )
        stops += 1
        for number, tokens in outcome.tokens.items():
            assert tokens == want[number]
            del left[number]
        for u in outcome.unfinished:
            assert pack_tokens(want[u.id]).startswith(u.output)
            left[u.id] = msgspec.structs.replace(left[u.id], output=u.output)
    assert stops > 2


def test_a_row_that_ends_keeps_its_rblocks_while_a_step_uses_them():
    instance = Instance(0, EngineConfig(num_blocks=100, block_size=4))
    sampling = Sampling(max_tokens=20, stop_token_ids=(7,))
    for number in range(2):
        request = Request(number, pack_tokens([1, 2, 3]), sampling)
        instance.scheduler.add(instance._sequence(request, 0.0))
    first = instance.plan()
    ends = instance.advance(first.scheduled)
    second = instance.plan(ahead=True)
    assert [(s.id, count) for s, count in second.scheduled] == [(0, 1), (1, 1)]
    instance.learn(first.scheduled, ends, [7, 5], 1.0, following={0, 1})
    assert [s.id for s in instance.scheduler.running] == [1]
    assert sorted(instance.rm.tables) == [0, 1], "the second step writes there"
    ends = instance.advance(second.scheduled)
    third = instance.plan(ahead=True)
    assert [s.id for s, _ in third.scheduled] == [1]
    instance.learn(second.scheduled, ends, [9, 6], 2.0, following={1})
    assert sorted(instance.rm.tables) == [1]
    assert instance.scheduler.running[0].tokens == [1, 2, 3, 5, 6]
    assert instance.counters.generated_tokens == 3
    instance.check()


def test_nobody_is_preempted_while_a_step_is_computed():
    instance = Instance(0, EngineConfig(num_blocks=6, block_size=4))
    instance.scheduler.foresight.outputs.add(1, 1000)
    for number in range(2):
        request = Request(number, pack_tokens(range(6)), Sampling(max_tokens=15))
        instance.scheduler.add(instance._sequence(request, 0.0))
    step = instance.plan()
    while not instance.scheduler.short:
        assert len(step.scheduled) == 2
        ends = instance.advance(step.scheduled)
        following = instance.plan(ahead=True)
        instance.learn(step.scheduled, ends, [5, 6], 1.0, following={0, 1})
        step = following
    assert not step.scheduled
    assert instance.counters.preemptions == 0
    assert [s.id for s, _ in instance.plan().scheduled] == [0]
    assert instance.counters.preemptions == 1
    instance.check()
