"""Simulated jobs: every row once, the books agree at all times, and times by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hpc_distkv.control.policy import POLICIES
from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.decide.instance import Instance
from hpc_distkv.decide.plan import Plan
from hpc_distkv.simulate.cluster import Cluster, DeviceSpec, Measured
from hpc_distkv.simulate.deployment import Deployment
from hpc_distkv.simulate.member import DebtorLoad, Member
from hpc_distkv.simulate.models import MODELS, ModelShape
from hpc_distkv.simulate.simulation import RoundTimes, Simulation
from hpc_distkv.simulate.step import Steps
from hpc_distkv.simulate.workload import TraceRow

SPEED = Measured(
    fixed=0.010,
    per_token=0.001,
    prefill_per_token=0.0005,
    per_kv_token=1e-5,
    per_pair=2e-6,
    exchange=1e-4,
    bytes_per_second=1e9,
)
MODEL = ModelShape("tiny", 2, 64, 128, 4, 2, 16, 100)
BLOCK = 4
COPY = BLOCK * MODEL.kv_bytes_per_token / 1e9
"""Seconds in which an rBlock goes to the host's memory, or comes back."""


def deployment(
    instances: int = 3,
    blocks: int = 12,
    policy: str = "lend",
    batched: int = 16,
    seqs: int = 4,
    host: int = 0,
) -> Deployment:
    """Instances of one rank on two nodes, with pools of a few rBlocks."""
    cluster = Cluster(
        nodes=instances, gpus_per_node=1, device=DeviceSpec("toy", 1e9, 0), measured=SPEED
    )
    config = EngineConfig(
        blocks,
        BLOCK,
        seqs,
        batched,
        POLICIES[policy],
        move_budget=BLOCK,
        enable_prefix_caching=True,
        host_blocks=host,
        host_copy_seconds=2 * COPY,
    )
    return Deployment(cluster, MODEL, 1, config)


def run(where: Deployment, rows: Sequence[TraceRow]) -> tuple[list[int], Simulation]:
    """The rows' numbers in the order of their answers; the books are checked after every event."""
    simulation = Simulation(where, rows)
    answered: list[int] = []
    note = simulation.record.finish
    simulation.record.finish = lambda result: (answered.append(result.id), note(result))[1]
    while simulation.advance():
        simulation.check()
    simulation.check()
    return answered, simulation


def virtual(figures: dict[str, Any]) -> dict[str, Any]:
    """Without what depends on the machine."""
    rounds = {name: figures["rounds"][name] for name in ("count", "bytes")}
    return {**figures, "rounds": rounds, "simulation": None}


QUICK = [Phase.explicit, Phase.reuse, Phase.generate]
"""A job that is stuck takes long to shrink."""
TEXTS = [7, 30, 50]
"""Tokens of what some rows begin with."""


def made(own: int, output: int, beyond: int, text: int) -> TraceRow:
    """`text` -1: it shares nothing."""
    row = TraceRow(own, output, limit=output + beyond)
    if text < 0:
        return row
    return row._replace(prompt=TEXTS[text] + own, prefix=text, prefix_tokens=TEXTS[text])


row = st.builds(
    made,
    st.integers(1, 90),
    st.integers(1, 30),
    st.integers(0, 20),
    st.integers(-1, len(TEXTS) - 1),
)
rows = st.lists(row, min_size=1, max_size=14)


@settings(max_examples=60, deadline=None, phases=QUICK)
@given(
    rows,
    st.sampled_from(sorted(POLICIES)),
    st.integers(1, 4),
    st.integers(3, 12),
    st.sampled_from([0, 0, 1, 5, 20]),
)
def test_every_row_that_fits_is_answered_once_and_the_books_agree(
    rows, policy, instances, blocks, host
):
    where = deployment(instances, blocks, policy, host=host)
    answered, simulation = run(where, rows)
    room = BLOCK * (blocks * (instances if policy.startswith("lend") else 1) + host)
    fitting = [n for n, row in enumerate(rows) if row.prompt + row.max_tokens - 1 <= room]
    assert sorted(answered) == fitting
    figures = simulation.record.figures(where)
    assert figures["rows"] == {"answered": len(fitting), "refused": len(rows) - len(fitting)}
    assert figures["output_tokens"] == sum(rows[n].output for n in fitting)


@settings(max_examples=20, deadline=None, phases=QUICK)
@given(rows, st.sampled_from(["lend", "lend-greedy", "migrate"]), st.sampled_from([0, 20]))
def test_nobody_owes_anything_at_the_end(rows, policy, host):
    ended = run(deployment(policy=policy, host=host), rows)[1]
    for member in ended.members:
        rm = member.instance.rm
        assert not rm.lender.loans
        assert not rm.borrower.debts
        assert rm.slots.free == rm.slots.num_blocks
        assert rm.swap.used == 0


@settings(max_examples=10, deadline=None, phases=QUICK)
@given(rows, st.sampled_from(["lend", "migrate"]), st.sampled_from([0, 20]))
def test_the_same_rows_give_the_same_figures(rows, policy, host):
    where = deployment(policy=policy, host=host)
    first, second = (run(where, rows)[1].record.figures(where) for _ in range(2))
    assert virtual(first) == virtual(second)


def test_one_row_takes_the_sum_of_its_steps():
    """A prompt of 37 in chunks of 16, 16 and 5; three more tokens at contexts of 38 to 40."""
    pairs = [sum(range(1, 17)), sum(range(17, 33)), sum(range(33, 38))]
    prompt = 3 * 0.010 + 37 * 0.0005 + sum(pairs) * 2e-6
    decode = 3 * (0.010 + 0.001) + (38 + 39 + 40) * 1e-5
    rounds = RoundTimes(floor=0.5, answer=0.25, per_instance=0.125)
    simulation = Simulation(deployment(1), [TraceRow(37, 4)], rounds)
    record = simulation.run()
    assert record.seconds == pytest.approx(0.375 + prompt + decode, abs=1e-12)
    latency = record.figures(deployment(1))["latency_s"]["max"]
    assert latency == pytest.approx(prompt + decode, abs=1e-4)


def test_rows_beside_each_other_share_the_step():
    """Two prompts of 5 in one step, then each step has both until the shorter one ends."""
    prompt = 0.010 + 10 * 0.0005 + 2 * sum(range(1, 6)) * 2e-6
    both = 0.010 + 2 * 0.001 + 2 * 6 * 1e-5
    one = 0.010 + 0.001 + 7 * 1e-5
    rounds = RoundTimes(floor=0.0, answer=0.0, per_instance=0.0)
    record = Simulation(deployment(1), [TraceRow(5, 2), TraceRow(5, 3)], rounds).run()
    assert record.seconds == pytest.approx(prompt + both + one, abs=1e-12)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_only_lending_answers_a_row_longer_than_a_pool(policy):
    answered, simulation = run(deployment(policy=policy), [TraceRow(100, 10), TraceRow(10, 3)])
    lends = policy.startswith("lend")
    assert sorted(answered) == ([0, 1] if lends else [1])
    figures = simulation.record.figures(deployment(policy=policy))
    assert figures["rows"]["refused"] == (0 if lends else 1)
    assert (figures["remote_share"] > 0.3) == lends


def test_a_step_waits_for_the_longer_of_its_own_and_its_creditors_attention(monkeypatch):
    """One row, so creditors are idle: they attend in 1e-5 s a token, and queries and partial
    results take 2 layers · 0.1 ms and the wire."""
    seen = []
    begin = Steps.begin

    def watch(steps: Steps, member: Member, now: float) -> float:
        tables = {n: dict(table.remote) for n, table in member.instance.rm.tables.items()}
        sizes = {
            n: {c: len(blocks) for c, blocks in remote.items()} for n, remote in tables.items()
        }
        seconds = begin(steps, member, now)
        moved = member.plan.moves or member.plan.recalls
        if [count for _, count in member.plan.scheduled] == [1] and not moved:
            sequence = member.plan.scheduled[0].sequence
            seen.append((seconds, sequence.length, sizes[sequence.id]))
        return seconds

    monkeypatch.setattr(Steps, "begin", watch)
    run(deployment(instances=4), [TraceRow(120, 12)])
    several = 0
    for seconds, length, remote in seen:
        home = length - BLOCK * sum(remote.values())
        exchange = 2 * 1e-4 + len(remote) * MODEL.wire_bytes / 1e9 if remote else 0.0
        away = BLOCK * max(remote.values(), default=0) * 1e-5 + exchange
        assert seconds == pytest.approx(0.011 + max(home * 1e-5, away), abs=1e-12)
        several += len(remote) > 1
    assert several


def test_a_guest_makes_the_creditors_step_longer_by_its_serving():
    """A step of 1 s; from 0.2 s to 0.6 s half of the time goes to a guest: it ends at 1.2 s."""
    member = Member(0, Instance(0, deployment().config))
    member.begin(0.0, Plan([], [], [], []))
    member.lasting = 1.0
    member.count_serving(0.2)
    member.visits[1] = DebtorLoad(0.2, 0.5, [], [])
    assert member.due(0.4) == pytest.approx(0.4 + (1 - 0.3) / 0.5)
    member.count_serving(0.6)
    del member.visits[1]
    assert member.due(1.0) == pytest.approx(1.2)
    assert member.due(1.2) is None


def test_a_busy_creditor_answers_when_its_operator_is_done(monkeypatch):
    """The mean wait of queries that come at any time of a layer, by brute force. A layer of the
    model has attention and matrices of 128, 64, 256 and 128 columns of the hidden size."""
    seen = []
    begin = Steps.begin

    def watch(steps: Steps, member: Member, now: float) -> float:
        seconds = begin(steps, member, now)
        if member.plan.scheduled:
            seen.append((member.load, member.computing, member.gaps))
        return seconds

    monkeypatch.setattr(Steps, "begin", watch)
    run(deployment(1), [TraceRow(20, 3), TraceRow(5, 5)])
    for load, computing, gaps in seen:
        attention = load.decode_kv * 1e-5 + load.prefill_pairs * 2e-6
        linear = computing - attention
        parts = [attention, *(linear * columns / 576 for columns in (128, 64, 256, 128))]
        ends = np.cumsum(parts)
        moments = (np.arange(200_000) + 0.5) / 200_000 * computing
        waits = ends[np.searchsorted(ends, moments)] - moments
        assert gaps == pytest.approx(waits.mean(), rel=1e-3)


def test_many_instances_share_the_rows_evenly():
    """Equal rows on equal instances: as fast as one instance with its part of them."""
    where = deployment(8, blocks=64, policy="queue")
    alone = deployment(1, blocks=64)
    rounds = RoundTimes(floor=0.0, answer=0.0, per_instance=0.0)
    many = Simulation(where, [TraceRow(20, 10)] * 16, rounds).run()
    one = Simulation(alone, [TraceRow(20, 10)] * 2, rounds).run()
    assert many.seconds == pytest.approx(one.seconds, abs=1e-12)


def test_planner_and_dgfm_can_be_left_out():
    lend = POLICIES["lend"]
    for policy in (replace(lend, planner=False), replace(lend, dgfm=False)):
        where = deployment()
        where = replace(where, config=replace(where.config, policy=policy))
        assert len(run(where, [TraceRow(60, 8)] * 6)[0]) == 6


# -- the host's memory --------------------------------------------------------------------------


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("instances", [1, 2])
def test_one_row_may_fill_all_pools_and_the_hosts_memory(policy, instances):
    pools = 12 * instances if policy.startswith("lend") else 12
    where = deployment(instances, policy=policy, host=20)
    row = TraceRow(BLOCK * (pools + 20) - 9, 10)
    answered, simulation = run(where, [row, row._replace(prompt=row.prompt + 1)])
    assert answered == [0]
    counters = simulation.record.figures(where)["counters"]
    assert counters["peak_host"] == 20
    assert counters["host_time"] > 0
    assert (counters["peak_borrowed"] > 0) == (pools > 12)


def test_preempted_rows_are_not_computed_again():
    """Rows that end early let more of the others begin than there is room for."""
    rows = [TraceRow(10, 4 if number < 8 else 22, limit=22) for number in range(16)]
    without, with_host = (
        run(where, rows)[1].record.figures(where)["counters"]
        for where in (deployment(1, seqs=8, host=host) for host in (0, 40))
    )
    distinct = sum(row.prompt for row in rows)
    tails = BLOCK * with_host["preemptions"]
    assert tails > 0
    assert without["prompt_tokens"] > distinct + tails
    assert distinct <= with_host["prompt_tokens"] <= distinct + tails
    assert with_host["blocks_to_host"] >= with_host["blocks_from_host"] > 0 == without["peak_host"]


def test_copies_that_cost_more_than_to_compute_again_are_not_made():
    rows = [TraceRow(10, 4 if number < 8 else 22, limit=22) for number in range(16)]
    where = deployment(1, seqs=8, host=40)
    where = replace(where, config=replace(where.config, host_copy_seconds=1e3))
    counters = run(where, rows)[1].record.figures(where)["counters"]
    assert counters["preemptions"] > 0 == counters["blocks_to_host"]


def test_a_step_of_a_cpu_copies_and_attends_to_what_is_in_its_hosts_memory_too(monkeypatch):
    """A row twice as long as the pool, alone: 1e-5 s for a KV token of a decode and 2e-6 s for a
    pair of a prompt, wherever it is, and 1e-9 s for a byte that is copied."""
    seen = []
    begin = Steps.begin

    def watch(steps: Steps, member: Member, now: float) -> float:
        seconds = begin(steps, member, now)
        ((sequence, count),) = member.plan.scheduled or [(None, 0)]
        if count:
            moved = len(member.plan.to_host) + len(member.plan.from_host)
            away = member.instance.rm.swap.used - len(member.plan.to_host)
            seen.append((seconds, count, sequence.computed, moved, away))
        return seconds

    monkeypatch.setattr(Steps, "begin", watch)
    run(deployment(1, host=20), [TraceRow(90, 12)])
    for seconds, count, computed, moved, _ in seen:
        own = 0.011 + (computed + 1) * 1e-5
        if count > 1:
            pairs = count * computed + count * (count + 1) / 2
            own = 0.010 + count * 0.0005 + pairs * 2e-6
        assert seconds == pytest.approx(own + moved * COPY, abs=1e-12)
    for prompt in (True, False):
        assert any(away for _, count, _, _, away in seen if (count > 1) == prompt)
    assert any(moved for *_, moved, _ in seen)


def test_a_step_of_a_gpu_waits_for_the_hosts_attention_where_its_own_is_shorter(monkeypatch):
    """A row of 20 to 30 rBlocks of llama2-7b on one A100 with a pool of 12: decodes attend to the
    rest in place, at 40.96 GB/s and with 10 us for each way of queries and results."""
    seen = []
    begin = Steps.begin

    def watch(steps: Steps, member: Member, now: float) -> float:
        seconds = begin(steps, member, now)
        if [row.tokens for row in member.plan.scheduled] == [1] and not member.plan.moving:
            own = member.plan.scheduled[0].sequence.length
            seen.append((seconds, own, member.instance.rm.swap.used))
        return seconds

    monkeypatch.setattr(Steps, "begin", watch)
    a100 = Cluster.load(Path(__file__).parents[2] / "jobs" / "clusters" / "a100-4x8.toml")
    one = Cluster(1, 1, a100.device, roofline=a100.roofline, links=a100.links, host=a100.host)
    llama = MODELS["llama2-7b"]
    policy = POLICIES["queue"]
    where = Deployment.fit(one, llama, EngineConfig(1, 32, policy=policy), 1, 10**9)
    where = replace(where, config=replace(where.config, num_blocks=12))
    assert len(run(where, [TraceRow(20 * 32, 10 * 32)])[0]) == 1
    cost = where.cost()
    for seconds, length, blocks in seen:
        home, away = length - 32 * blocks, 32 * blocks
        there = 64 * 10e-6 + llama.wire_bytes / 25.2e9 + away * 524_288 / 40.96e9
        longer = max(0.0, there - cost.attention_time(home, 0)) if blocks else 0.0
        assert seconds == pytest.approx(cost.step_time(1, home, 0, 0) + longer, abs=1e-12)
    assert sum(blocks > 0 for *_, blocks in seen) > 100
