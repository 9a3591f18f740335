"""Times of steps, exchanges and moves against numbers by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_distkv.errors import OptionError
from hpc_distkv.simulate.cluster import (
    ELSEWHERE,
    NODE,
    SWITCH,
    Cluster,
    DeviceSpec,
    Link,
    LinkSpeeds,
    Measured,
    Roofline,
)
from hpc_distkv.simulate.cost import CostModel
from hpc_distkv.simulate.models import MODELS

SHIPPED = Path(__file__).parents[2] / "jobs" / "clusters"
LLAMA, LLAMA_13B, BIG = MODELS["llama2-7b"], MODELS["llama2-13b"], MODELS["llama2-70b"]


def a100(adapters: int = 8, overhead: float = 0.0) -> Cluster:
    """Two A100 nodes without overheads, NVLink inside, `adapters` of 10 GB/s per node outside."""
    return Cluster(
        nodes=2,
        gpus_per_node=8,
        nodes_per_switch=2,
        device=DeviceSpec("A100", 80e9, 0),
        roofline=Roofline(312e12, 2.039e12, overhead, overhead, 0.5, 0.8, 0.4, 0.7),
        links=LinkSpeeds(
            Link(2e-6, 300e9, 0.8),
            Link(10e-6, 10e9, 0.9, gpus_per_link=8 // adapters),
            Link(20e-6, 10e9, 0.5, gpus_per_link=8 // adapters),
        ),
    )


# -- steps --------------------------------------------------------------------------------------


def test_one_decode_row_takes_the_reading_of_the_weights() -> None:
    """32 layers · (4 · 4096² + 3 · 4096 · 11008) + 32000 · 4096 weights, 2 bytes each, at
    0.8 · 2.039 TB/s: 8.1 ms. The embedding table of the 13.5 GB is not read."""
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
    seconds = CostModel(a100(), LLAMA, 1, 32).step_time(1, 0, 0, 0)
    assert seconds == pytest.approx(2 * weights / (0.8 * 2.039e12))
    assert seconds == pytest.approx(13.5e9 / (0.8 * 2.039e12), rel=0.025)


def test_many_tokens_take_their_flops() -> None:
    """2 · 6.476e9 FLOPs a prompt token in the layers, at half of 312 TFLOP/s; the head computes
    decode rows only."""
    cost = CostModel(a100(), LLAMA, 1, 32)
    assert cost.step_time(0, 0, 4096, 0) == pytest.approx(
        4096 * 2 * 6.476e9 / (0.5 * 312e12), rel=1e-3
    )
    assert cost.step_time(4096, 0, 0, 0) == pytest.approx(
        4096 * 2 * 6.607e9 / (0.5 * 312e12), rel=1e-3
    )


def test_decode_attention_takes_the_reading_of_its_kv() -> None:
    """100,000 tokens of 524,288 bytes at 0.7 · 2.039 TB/s, the same for a guest's."""
    cost = CostModel(a100(), LLAMA, 1, 32)
    expected = 100_000 * 524_288 / (0.7 * 2.039e12)
    assert cost.step_time(8, 100_000, 0, 0) - cost.step_time(8, 0, 0, 0) == pytest.approx(expected)
    assert cost.attention_time(100_000, 0) == pytest.approx(expected)


def test_prompt_attention_takes_its_flops() -> None:
    """4 · 4096 FLOPs a pair in each of 32 layers, at 0.4 · 312 TFLOP/s."""
    cost = CostModel(a100(), LLAMA, 1, 32)
    pairs = 512 * 10_000
    expected = pairs * 32 * 4 * 4096 / (0.4 * 312e12)
    assert cost.step_time(0, 0, 512, pairs) - cost.step_time(0, 0, 512, 0) == pytest.approx(
        expected
    )
    assert cost.attention_time(0, pairs) == pytest.approx(expected)


def test_overheads_come_once_a_step_and_once_a_layer() -> None:
    plain, slow = CostModel(a100(), LLAMA, 1, 32), CostModel(a100(overhead=1e-3), LLAMA, 1, 32)
    for work in ((1, 10, 0, 0), (0, 0, 16, 100)):
        assert slow.step_time(*work) - plain.step_time(*work) == pytest.approx(33e-3)
    assert slow.step_time(0, 0, 0, 0) == 0


def test_ranks_share_weights_and_kv_and_pay_two_all_reduces_a_layer() -> None:
    """One row on 8 ranks: 160 all-reduces of 16 KiB, by tree: 6 latencies of 2 µs and 32 KiB at
    240 GB/s each."""
    cost = CostModel(a100(), BIG, 8, 32)
    weights = 2 * BIG.parameters / 8 / (0.8 * 2.039e12)
    reduces = 160 * (6 * 2e-6 + 2 * 16_384 / 240e9)
    assert cost.step_time(1, 0, 0, 0) == pytest.approx(weights + reduces)
    kv = 100_000 * 327_680 / 8 / (0.7 * 2.039e12)
    assert cost.attention_time(100_000, 0) == pytest.approx(kv)


def test_large_all_reduces_go_by_ring() -> None:
    """4,096 tokens on 2 ranks of 13B: 80 all-reduces of 42 MB, each once over the link in both
    halves together."""
    cost = CostModel(a100(), LLAMA_13B, 2, 32)
    compute = 4096 * 2 * LLAMA_13B.layer_parameters / (2 * 0.5 * 312e12)
    ring = 80 * (2 * 2e-6 + 4096 * 5120 * 2 / 240e9)
    assert cost.step_time(0, 0, 4096, 0) == pytest.approx(compute + ring)


@pytest.mark.parametrize(("adapters", "rate"), [(8, 72e9), (1, 9e9)])
def test_an_instance_over_two_nodes_reduces_over_all_their_adapters(
    adapters: int, rate: float
) -> None:
    """Slope between two large prompts: 2 · 15/16 of 16 KiB a token and all-reduce."""
    cost = CostModel(a100(adapters), BIG, 16, 32)
    compute = 2 * BIG.layer_parameters / (16 * 0.5 * 312e12)
    slope = (cost.step_time(0, 0, 60_000, 0) - cost.step_time(0, 0, 50_000, 0)) / 10_000
    assert slope == pytest.approx(compute + 160 * 2 * 15 / 16 * 16_384 / rate)


def test_copied_kv_heads_are_read_by_every_rank() -> None:
    """llama2-70b has 8 KV heads: 16 ranks read no faster than 8."""
    cost = CostModel(a100(), BIG, 16, 32)
    assert cost.attention_time(1000, 0) == pytest.approx(1000 * 40_960 / (0.7 * 2.039e12))


# -- exchanges and moves ------------------------------------------------------------------------


def test_an_exchange_takes_two_latencies_a_layer_and_the_papers_bytes() -> None:
    cost = CostModel(a100(), LLAMA, 1, 32)
    assert cost.exchanges_time([(10, SWITCH)]) == pytest.approx(32 * 2 * 10e-6 + 10 * 532_480 / 9e9)
    assert cost.exchanges_time([(10, NODE)]) == pytest.approx(32 * 2 * 2e-6 + 10 * 532_480 / 240e9)
    assert cost.exchanges_time([(0, SWITCH)]) == 0


def test_lanes_carry_their_heads_each_over_its_own_link() -> None:
    own, shared = CostModel(a100(8), BIG, 8, 32), CostModel(a100(1), BIG, 8, 32)
    latency = 80 * 2 * 10e-6
    assert own.exchanges_time([(4, SWITCH)]) == pytest.approx(latency + 4 * 2_662_400 / 8 / 9e9)
    assert shared.exchanges_time([(4, SWITCH)]) == pytest.approx(latency + 4 * 2_662_400 / 9e9)
    half = CostModel(a100(2), BIG, 8, 32)
    assert half.exchanges_time([(4, SWITCH)]) == pytest.approx(latency + 4 * 2_662_400 / 2 / 9e9)


def test_exchanges_at_the_same_time_share_latency_but_not_bytes() -> None:
    cost = CostModel(a100(), LLAMA, 1, 32)
    together = cost.exchanges_time([(3, SWITCH), (0, NODE), (5, ELSEWHERE)])
    assert together == pytest.approx(32 * 2 * 20e-6 + 3 * 532_480 / 9e9 + 5 * 532_480 / 5e9)
    assert cost.exchanges_time([]) == 0
    assert cost.exchanges_time([(7, NODE)]) == pytest.approx(32 * 2 * 2e-6 + 7 * 532_480 / 240e9)


def test_moves_take_the_bytes_of_their_blocks() -> None:
    cost = CostModel(a100(), LLAMA, 1, 32)
    assert cost.block_bytes == 32 * 524_288
    assert cost.move_time(10, ELSEWHERE) == pytest.approx(20e-6 + 10 * 32 * 524_288 / 5e9)
    assert cost.move_time(0, ELSEWHERE) == 0
    lanes = CostModel(a100(), BIG, 8, 32)
    assert lanes.move_time(10, SWITCH) == pytest.approx(10e-6 + 10 * 32 * 40_960 / 9e9)


def test_local_attention_hides_an_exchange_up_to_its_own_length() -> None:
    assert CostModel.overlap(3.0, 2.0) == 0
    assert CostModel.overlap(2.0, 3.0) == 1
    assert CostModel.overlap(0.0, 3.0) == 3


def test_a_query_is_cheaper_than_the_kv_it_spares_from_the_papers_length_on() -> None:
    """Shipping a query beats fetching L tokens when L exceeds query heads / KV heads."""
    for model in (LLAMA, BIG):
        cost = CostModel(a100(), model, 1, 1)
        query = cost.exchanges_time([(1001, SWITCH)]) - cost.exchanges_time([(1, SWITCH)])
        token = cost.move_time(1001, SWITCH) - cost.move_time(1, SWITCH)
        assert query / token == pytest.approx(model.heads / model.kv_heads, rel=0.02)


# -- measured -----------------------------------------------------------------------------------


def measured() -> CostModel:
    cluster = Cluster(
        nodes=1,
        gpus_per_node=2,
        device=DeviceSpec("CPU", 8e9, 0),
        measured=Measured(20e-3, 1e-3, 0.5e-3, 2e-6, 1e-7, 50e-6, 2e9),
    )
    return CostModel(cluster, MODELS["smollm2-135m"], 1, 32)


def test_measured_coefficients_are_used_as_they_are() -> None:
    cost = measured()
    assert cost.step_time(4, 1000, 100, 5000) == pytest.approx(
        20e-3 + 4 * 1e-3 + 100 * 0.5e-3 + 1000 * 2e-6 + 5000 * 1e-7
    )
    assert cost.attention_time(1000, 0) == pytest.approx(2e-3)
    assert cost.step_time(0, 0, 0, 0) == 0
    assert cost.exchanges_time([(1, NODE)]) == pytest.approx(30 * 50e-6, rel=0.05)
    assert cost.move_time(10, NODE) == pytest.approx(10 * 32 * 23_040 / 2e9)


def test_measured_exchanges_of_prompts_also_pay_for_their_bytes() -> None:
    """30 layers · 9 heads · (2 · 64 · 2 + 8) bytes = 71,280 a row at 2 GB/s."""
    assert measured().exchanges_time([(512, SWITCH)]) == pytest.approx(
        30 * 50e-6 + 512 * 71_280 / 2e9
    )


def test_measured_speeds_are_those_of_one_rank() -> None:
    cluster = Cluster(
        nodes=1,
        gpus_per_node=3,
        device=DeviceSpec("CPU", 8e9, 0),
        measured=Measured(0, 0, 0, 0, 0, 0, 1),
    )
    with pytest.raises(OptionError, match=r"size 3: .* measured on instances of one rank"):
        CostModel(cluster, MODELS["smollm2-135m"], 3, 32)


# -- properties ---------------------------------------------------------------------------------

COSTS = [
    CostModel(Cluster.load(SHIPPED / "a100-4x8.toml"), LLAMA, 1, 32),
    CostModel(Cluster.load(SHIPPED / "a100-4x8.toml"), BIG, 32, 16),
    CostModel(Cluster.load(SHIPPED / "h100-10000.toml"), BIG, 8, 32),
    measured(),
]
WORK = st.tuples(
    st.integers(1, 500),
    st.integers(0, 10**7),
    st.integers(0, 8192),
    st.integers(0, 10**9),
)


@given(st.sampled_from(COSTS), WORK, WORK)
def test_more_work_never_takes_less_time(
    cost: CostModel, work: tuple[int, ...], more: tuple[int, ...]
) -> None:
    larger = [a + b for a, b in zip(work, more, strict=True)]
    assert 0 <= cost.step_time(*work) <= cost.step_time(*larger)


@given(st.sampled_from(COSTS), WORK, WORK)
def test_one_batch_takes_no_longer_than_two(
    cost: CostModel, work: tuple[int, ...], other: tuple[int, ...]
) -> None:
    both = [a + b for a, b in zip(work, other, strict=True)]
    apart = cost.step_time(*work) + cost.step_time(*other)
    assert cost.step_time(*both) <= apart * (1 + 1e-9)


@given(st.sampled_from(COSTS), st.integers(0, 5000), st.integers(0, 5000))
def test_exchanges_and_moves_grow_with_size_and_distance(
    cost: CostModel, n: int, more: int
) -> None:
    for time in (lambda n, level: cost.exchanges_time([(n, level)]), cost.move_time):
        near, middle, far = (time(n, level) for level in (NODE, SWITCH, ELSEWHERE))
        assert 0 <= near <= middle <= far <= time(n + more, ELSEWHERE)


@given(st.floats(0, 10), st.floats(0, 10))
def test_an_exchange_shows_at_most_itself_and_never_less_than_its_excess(
    local: float, exchange: float
) -> None:
    shown = CostModel.overlap(local, exchange)
    assert 0 <= shown <= exchange
    assert local + shown >= exchange or shown == pytest.approx(exchange - local)


@pytest.mark.parametrize(("model", "tp"), [("llama2-13b", 16), ("llama2-7b", 3)])
def test_an_instance_that_cannot_be_cut_is_refused(model: str, tp: int) -> None:
    with pytest.raises(OptionError, match=f"tensor parallel size {tp}"):
        CostModel(a100(), MODELS[model], tp, 32)
