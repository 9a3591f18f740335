"""What the host's memory adds to a step, against numbers by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.simulate.cluster import Cluster, DeviceSpec, Measured
from hpc_distkv.simulate.cost import CostModel, HostRates, Line
from hpc_distkv.simulate.host_memory import HostCost, HostQueries, HostTime, staged_from
from hpc_distkv.simulate.models import MODELS

A100 = Cluster.load(Path(__file__).parents[2] / "jobs" / "clusters" / "a100-4x8.toml")
LLAMA, BIG = MODELS["llama2-7b"], MODELS["llama2-70b"]
RANK = Cluster(1, 1, DeviceSpec("CPU", 8e9, 0), measured=Measured(1, 1, 1, 2e-6, 1e-7, 1e-4, 2e9))
CONFIG = EngineConfig(num_blocks=1, block_size=32)
DEVICE = CostModel(A100, LLAMA, 1, 32).rates._replace(
    kv_token=1e-6,
    pair=1e-8,
    host=HostRates(
        move=Line(0.01, 0.032), kv_token=5e-4, pair=1e-4, exchange=Line(0.1, 0.002), beside=True
    ),
)
"""Round numbers: a token is copied in 1 ms; the host reads it in 0.5 ms, and computes a pair in
0.1 ms."""


def host(staged: float = math.inf) -> HostCost:
    return HostCost(DEVICE, replace(CONFIG, host_staged_from=staged))


# -- coefficients -------------------------------------------------------------------------------


def test_rates_are_those_of_the_bus_and_of_a_devices_part_of_the_host() -> None:
    """A token of llama2-7b has 524,288 bytes in 32 layers, a row and a token 32 · 4 · 4096 FLOPs;
    the bus moves 25.2 GB/s, the host 40.96 GB/s and 0.69 TFLOP/s."""
    rates = CostModel(A100, LLAMA, 1, 32).rates.host
    assert rates is not None
    assert rates.move == pytest.approx((10e-6, 32 * 524_288 / 25.2e9))
    assert rates.kv_token == pytest.approx(524_288 / 40.96e9)
    assert rates.pair == pytest.approx(524_288 / 0.69e12)
    assert rates.exchange == pytest.approx((64 * 10e-6, LLAMA.wire_bytes / 25.2e9))


def test_every_rank_of_an_instance_has_its_own_bus_and_its_heads() -> None:
    one, eight = (CostModel(A100, BIG, tp, 32).rates.host for tp in (1, 8))
    assert one is not None
    assert eight is not None
    assert eight.move.each == pytest.approx(one.move.each / 8)
    assert eight.kv_token == pytest.approx(one.kv_token / 8)
    assert eight.pair == pytest.approx(one.pair / 8)
    assert staged_from(eight, 32) == pytest.approx(staged_from(one, 32))


def test_measured_ranks_copy_and_attend_as_they_do_at_home() -> None:
    rates = CostModel(RANK, LLAMA, 1, 32).rates.host
    assert rates == HostRates(Line(0.0, 32 * 524_288 / 2e9), 2e-6, 1e-7, Line(), beside=False)
    assert staged_from(rates, 32) == math.inf


def test_copies_pay_from_the_rows_on_that_the_engine_would_measure() -> None:
    """16 rows take 16 · 0.1 ms of computing, as reading takes less: one takes 0.1 ms, and a copy
    1 ms. A host that computes ten times as fast reads for 16 rows in 0.5 ms."""
    assert DEVICE.host is not None
    assert staged_from(DEVICE.host, 32) == pytest.approx(1e-3 / 1e-4)
    assert staged_from(DEVICE.host._replace(pair=1e-5), 32) == pytest.approx(1e-3 * 16 / 5e-4)


# -- steps with a device ------------------------------------------------------------------------


def test_a_step_without_anything_there_takes_no_longer() -> None:
    assert host().time(0, [], 1.0, 2.0) == (0, 0, 0)


def test_moves_go_beside_the_layers() -> None:
    assert host().time(10, [], 1.0, 2.0) == pytest.approx((0, 0, 0.01 + 10 * 0.032))


def test_the_hosts_attention_shows_where_it_is_longer_than_the_devices() -> None:
    """One row reads 1,000 tokens in 0.5 s, twenty compute with 100 in 0.2 s; 21 rows' way takes
    0.142 s."""
    legs = [HostQueries(1, 1000), HostQueries(20, 100)]
    there = 0.5 + 0.2 + 0.1 + 21 * 0.002
    assert host().time(0, legs, 0.3, 2.0).attending == pytest.approx(there - 0.3)
    assert host().time(0, legs, 0.9, 2.0) == (0, 0, 0)


def test_legs_of_many_rows_are_copied_and_those_of_few_are_not() -> None:
    """Both buffers take 128 of 1,000 rBlocks while the rest of the layers is computed, 4.096 s;
    before them go two rBlocks that move."""
    legs = [HostQueries(3, 100), HostQueries(50, 32_000)]
    in_place = 0.05 + 0.1 + 3 * 0.002
    assert host(10).time(2, legs, 0.1, 9.0) == pytest.approx(
        HostTime(0.01 + 2 * 0.032, in_place - 0.1 + 32 - 128 * 0.032)
    )


def test_copies_of_a_short_step_are_hidden_by_no_more_than_that() -> None:
    assert host(10).time(0, [HostQueries(50, 32_000)], 0.1, 0.5).attending == pytest.approx(
        32 - 0.5
    )


def test_what_both_buffers_hold_costs_the_devices_attention_alone() -> None:
    """50,000 rows and 1,280 tokens at 1e-8 s a pair."""
    time = host(10).time(0, [HostQueries(50_000, 1280)], 0.1, 9.0)
    assert time.attending == pytest.approx(0.64)


# -- steps of ranks that compute on the host ----------------------------------------------------


def test_without_a_device_everything_comes_one_after_another() -> None:
    cost = HostCost(CostModel(RANK, LLAMA, 1, 32).rates, replace(CONFIG, host_staged_from=2.0))
    time = cost.time(4, [HostQueries(1, 1000), HostQueries(512, 1000)], 5.0, 9.0)
    block = 32 * 524_288 / 2e9
    assert time == pytest.approx((4 * block, 1000 * 2e-6 + 512 * 1000 * 1e-7, 0.0))


# -- properties ---------------------------------------------------------------------------------

SHIPPED = CostModel(A100, BIG, 8, 32).rates
COSTS = [
    host(),
    host(10),
    HostCost(SHIPPED, replace(CONFIG, host_staged_from=3.0)),
    HostCost(CostModel(RANK, LLAMA, 1, 32).rates, CONFIG),
]
LEGS = st.lists(st.builds(HostQueries, st.integers(1, 600), st.integers(32, 10**5)), max_size=4)


@given(st.sampled_from(COSTS), st.integers(0, 50), st.integers(0, 50), LEGS, LEGS, st.floats(0, 2))
def test_more_of_it_never_takes_less_time(
    cost: HostCost,
    moves: int,
    more: int,
    legs: list[HostQueries],
    others: list[HostQueries],
    attention: float,
) -> None:
    def longer(moves: int, legs: list[HostQueries]) -> float:
        time = cost.time(moves, legs, attention, 2 * attention)
        assert min(time) >= 0
        return max(time.before + 2 * attention + time.attending, time.beside)

    assert longer(moves, legs) <= longer(moves + more, legs + others) + 1e-9
