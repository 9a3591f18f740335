"""Models with a window in every layer: what falls behind it is freed, wherever it is, and no token
changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from clusters import run_cluster
from families import continuation, prompt, save
from seeded_schedule import SeededSchedule
from workloads import windowed_rows

from hpc_distkv.control.messages.requests import Request, Sampling, pack_tokens
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.decoder import Decoder
from hpc_distkv.model.weights import load_decoder
from hpc_distkv.ranks.rank import EngineOptions

BLOCK = 8


def windowed(path: Path, window: int, tokens: int, output: int) -> tuple[Decoder, Request, list]:
    """A model with a window in every layer, a request, and its answer."""
    torch.set_num_threads(1)
    transformer = save("mistral-window", path, sliding_window=window)
    ids = prompt(tokens, 5)
    request = Request(0, pack_tokens(ids), Sampling(output, 0.0, seed=0))
    model = load_decoder(path, ModelConfig.from_dir(path), "float32")
    return model, request, continuation(transformer, ids, output)


def test_a_row_keeps_no_rblocks_behind_its_window(tmp_path: Path) -> None:
    model, request, want = windowed(tmp_path, window=24, tokens=300, output=12)
    options = EngineOptions(num_blocks=60, block_size=BLOCK, threads=1, max_num_batched_tokens=16)
    outcome = run_cluster(model, [request], 1, options)
    assert outcome.tokens == {0: want}
    (counters,) = outcome.counters
    assert counters.held_block_steps / counters.steps <= (24 + 16) / BLOCK


def test_creditors_free_what_falls_behind_the_window(tmp_path: Path) -> None:
    """The window needs more than one rank has, so rBlocks are lent all the time; all of the row
    would need more than was ever lent at once."""
    model, request, want = windowed(tmp_path, window=90, tokens=180, output=25)
    options = EngineOptions(num_blocks=9, block_size=BLOCK, threads=1, max_num_batched_tokens=16)
    outcome = run_cluster(model, [request], 3, options)
    assert outcome.tokens == {0: want}
    counters = outcome.counters[0]
    assert counters.blocks_borrowed > counters.peak_borrowed > 0


@pytest.mark.parametrize("policy", ["lend", "migrate"])
@pytest.mark.parametrize("seed", range(8))
def test_crowded_ranks_give_the_tokens_of_one_large_rank(
    windowed_model: Decoder, seed: int, policy: str
) -> None:
    rows = windowed_rows(seed, 3 * 10 * BLOCK if policy == "lend" else 10 * BLOCK)
    sizes = {"block_size": BLOCK, "threads": 1, "max_num_seqs": 16}
    large = EngineOptions(num_blocks=4000, max_num_batched_tokens=512, **sizes)
    small = EngineOptions(num_blocks=10, max_num_batched_tokens=32, policy=policy, **sizes)
    schedule = SeededSchedule(seed) if seed % 2 else None
    outcome = run_cluster(windowed_model, rows, 3, small, schedule)
    assert outcome.tokens == run_cluster(windowed_model, rows, 1, large).tokens
    assert policy != "lend" or sum(c.blocks_borrowed for c in outcome.counters) > 0
