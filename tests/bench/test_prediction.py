"""What is said of runs without running them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_distkv.bench.prediction import most_rate, predicted_rate
from hpc_distkv.control.policy import POLICIES
from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.family import FAMILIES
from hpc_distkv.simulate.workload import TraceRow

MODEL = ModelConfig(
    family=next(iter(FAMILIES.values())),
    num_layers=2,
    hidden_size=16,
    intermediate_size=32,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    vocab_size=50,
    max_position=4096,
)
SPEED = {
    "fixed": 0.04,
    "per_token": 0.004,
    "per_kv": 6e-6,
    "prompt": 0.0035,
    "exchange": 0.004,
}
CONFIG = EngineConfig(num_blocks=40, block_size=8, max_num_batched_tokens=64)


row = st.tuples(st.integers(2, 250), st.integers(1, 60)).map(lambda lengths: TraceRow(*lengths))
rows_of_any_length = st.lists(row, min_size=1, max_size=30)


@settings(max_examples=40, deadline=None)
@given(
    rows_of_any_length,
    st.integers(1, 4),
    st.sampled_from(sorted(POLICIES)),
    st.sampled_from([(40, 0), (25, 40)]),
)
def test_no_simulated_run_exceeds_what_is_called_the_most(rows, ranks, policy, memory):
    """With the host's memory also of rows longer than a pool."""
    blocks, host = memory
    config = replace(
        CONFIG,
        policy=POLICIES[policy],
        num_blocks=blocks,
        host_blocks=host,
        host_copy_seconds=1e-4,
    )
    most = most_rate(MODEL, config, ranks, [SPEED], rows)
    assert predicted_rate(MODEL, config, policy, ranks, [SPEED], rows) <= most * 1.001


def test_the_longest_row_bounds_any_number_of_ranks():
    rows = [TraceRow(10, 50)]
    alone = (
        10 * (0.0035 + 5 * 0.0035 / MODEL.attention_tokens) + 49 * (0.004 + 34.5 * 6e-6) + 50 * 0.04
    )
    for ranks in (1, 8):
        assert most_rate(MODEL, CONFIG, ranks, [SPEED], rows) <= 50 / alone * 1.001
    assert most_rate(MODEL, CONFIG, 8, [SPEED], rows) == pytest.approx(50 / alone)
