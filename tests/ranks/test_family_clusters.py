"""Every family in whole clusters: greedy tokens are those of transformers, however the KV cache is
spread over ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from clusters import run_cluster
from families import continuation, prompt, save

from hpc_distkv.control.messages.requests import Request, Sampling, pack_tokens
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.weights import load_decoder
from hpc_distkv.ranks.rank import EngineOptions

BLOCK = 8
ROWS = [(140, 10), (30, 12), (10, 20), (85, 6)]
"""(prompt, output) tokens: the first needs more than the pool of one of three ranks."""
FAMILIES = (
    "llama-dynamic",
    "mistral-window",
    "qwen2-window",
    "qwen3",
    "qwen3-moe",
    "phi3-partial",
    "gemma2",
    "gemma3",
    "gpt2-scaled",
    "bloom",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    transformer = save(name, tmp_path)
    model = load_decoder(tmp_path, ModelConfig.from_dir(tmp_path), "float32")
    prompts = [prompt(tokens, seed) for seed, (tokens, _) in enumerate(ROWS)]
    requests = [
        Request(number, pack_tokens(ids), Sampling(output, 0.0, seed=0))
        for number, (ids, (_, output)) in enumerate(zip(prompts, ROWS, strict=True))
    ]
    want = {
        number: continuation(transformer, ids, output)
        for number, (ids, (_, output)) in enumerate(zip(prompts, ROWS, strict=True))
    }
    for ranks, blocks in ((1, 200), (3, 11)):
        options = EngineOptions(
            num_blocks=blocks,
            block_size=BLOCK,
            threads=1,
            max_num_batched_tokens=48,
            max_num_seqs=16,
        )
        outcome = run_cluster(model, requests, ranks, options)
        assert outcome.tokens == want
        borrowed = sum(counters.blocks_borrowed for counters in outcome.counters)
        # What falls behind the windows of all layers is freed: that may be enough.
        assert (borrowed > 0 or model.config.widest_window > 0) if ranks > 1 else borrowed == 0


@pytest.mark.parametrize("name", ["gemma2", "bloom", "mistral-window"])
def test_rows_that_share_a_beginning_get_the_tokens_of_transformers(
    name: str, tmp_path: Path
) -> None:
    """Windows and ALiBi look at positions. What lies behind the windows of all layers is freed
    instead of shared."""
    torch.set_num_threads(1)
    transformer = save(name, tmp_path)
    model = load_decoder(tmp_path, ModelConfig.from_dir(tmp_path), "float32")
    start = prompt(70, 0)
    prompts = [start + prompt(tokens, 1 + seed) for seed, tokens in enumerate([9, 9, 30, 17])]
    requests = [
        Request(number, pack_tokens(ids), Sampling(8, 0.0, seed=0))
        for number, ids in enumerate(prompts)
    ]
    want = {number: continuation(transformer, ids, 8) for number, ids in enumerate(prompts)}
    for ranks, blocks in ((1, 200), (3, 10)):
        options = EngineOptions(num_blocks=blocks, block_size=BLOCK, threads=1)
        outcome = run_cluster(model, requests, ranks, options)
        assert outcome.tokens == want
        cached = sum(counters.cached_tokens for counters in outcome.counters)
        assert (cached > 0) == (name != "mistral-window") or ranks > 1
