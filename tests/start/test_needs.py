"""What a rank is said to need is what it comes to take."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clusters import BLOCK, options, run_cluster
from families import TINY, save
from test_activations import demand, peaks  # noqa: F401

from hpc_distkv.model.build import empty_decoder
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.decoder import Decoder
from hpc_distkv.model.shard import ModelShard
from hpc_distkv.model.weights import load_decoder
from hpc_distkv.start.needs import (
    GPU_PROGRAM,
    ID_BYTES,
    PROGRAM,
    USUAL_TOKENS,
    Memory,
    rank_memory,
    size,
)
from hpc_distkv.start.options import EngineOptions
from hpc_distkv.step.sizes import LargestStep

GIB = 1 << 30
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def llama(tmp_path: Path) -> ModelConfig:
    """The shape of Llama 3.1 8B."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return ModelConfig.from_dir(tmp_path, weightless=True)


def held(thing: object, seen: set[int]) -> int:
    """Bytes of all weights in an object, each once, packed ones among them."""
    if isinstance(thing, torch.Tensor):
        if id(thing) in seen:
            return 0
        seen.add(id(thing))
        return thing.numel() * thing.element_size()
    if isinstance(thing, list | tuple):
        return sum(held(part, seen) for part in thing)
    named = hasattr(thing, "__dict__") and type(thing).__module__.startswith("hpc_distkv.model")
    return sum(held(part, seen) for part in vars(thing).values()) if named else 0


@pytest.mark.parametrize("name", TINY)
def test_weights_are_those_of_the_decoder(name: str, tmp_path: Path) -> None:
    """But for biases, and rows of norms: less than a twentieth, even of these tiny models."""
    save(name, tmp_path)
    config = ModelConfig.from_dir(tmp_path)
    decoder = load_decoder(tmp_path, config, "float32")
    parts = decoder.embedding, decoder.positions, decoder.layers, decoder.norm, decoder.head
    told = rank_memory(config, EngineOptions(dtype="float32")).weights
    assert told == pytest.approx(held(parts, set()), rel=0.05)


@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 16])
def test_a_shard_of_a_published_model_takes_its_part(llama: ModelConfig, lanes: int) -> None:
    """Its KV heads are held twice where there are fewer of them than ranks."""
    shard = ModelShard(lanes - 1, lanes)
    decoder = empty_decoder(llama, torch.bfloat16, torch.device("meta"), shard)
    parts = decoder.embedding, decoder.layers, decoder.norm, decoder.head
    given = EngineOptions(tensor_parallel_size=lanes)
    assert rank_memory(llama, given).weights == pytest.approx(held(parts, set()), rel=1e-3)


@pytest.mark.parametrize(("tokens", "rows", "longest"), [(96, 12, 150), (16, 16, 2)])
def test_no_step_on_a_cpu_takes_more_than_is_counted(
    whole: Decoder,
    peaks: list[int],  # noqa: F811
    tokens: int,
    rows: int,
    longest: int,
) -> None:
    """With prompts, whose layers take most, and with rows alone, whose logits do."""
    requests = demand(random.Random(0), 3 * rows, longest)
    settings = options(600, max_num_batched_tokens=tokens, max_num_seqs=rows)
    run_cluster(whole, requests, 1, settings)
    counted = LargestStep(tokens, rows, BLOCK, shares=True).computed_on_cpu(whole.config)
    assert 0.2 * counted < max(peaks) <= counted


def test_the_sum_of_a_rank(llama: ModelConfig) -> None:
    given = EngineOptions(kv_memory=3 * GIB, host_kv_memory=2 * GIB)
    memory = rank_memory(llama, given, first=False)
    assert memory.weights == pytest.approx(8_030_261_248 * 2, rel=1e-6)  # as published
    assert memory[2:] == (3 * GIB, 2 * GIB, 0, PROGRAM + (128256 << 10))
    assert memory.total == sum(memory)
    assert memory.words() == (
        f"weights 15.0 GiB + steps {size(memory.steps)} + KV cache 3072 MiB + --host-kv-memory "
        f"2048 MiB + program {size(memory.program)} = {size(memory.total)}"
    )
    assert rank_memory(llama, replace(given, dtype="float32")).weights == 2 * memory.weights


def test_blocks_are_bytes(llama: ModelConfig) -> None:
    block = 32 * 2 * 32 * 8 * 128 * 2
    assert rank_memory(llama, EngineOptions(num_blocks=7)).kv == 7 * block
    assert rank_memory(llama, EngineOptions()).kv == 128 * USUAL_TOKENS // 32 * block
    assert (
        rank_memory(llama, EngineOptions(num_blocks=7, tensor_parallel_size=2)).kv == 7 * block / 2
    )


def test_rank_0_reads_the_input(llama: ModelConfig) -> None:
    first = rank_memory(llama, EngineOptions(), instances=2, rows=1000)
    assert first.input == 4 * 2 * 16 * 131072 + 1000 * ID_BYTES
    assert rank_memory(llama, EngineOptions(), instances=10**6).input == 1 << 28


def test_more_instances_exchange_more(llama: ModelConfig) -> None:
    alone, lending = (rank_memory(llama, EngineOptions(), instances=n).steps for n in (1, 4))
    assert alone < lending
    queue = EngineOptions(policy="queue")
    assert rank_memory(llama, queue, instances=4).steps == alone


def test_a_file_and_a_gpu_take_nothing_of_it(llama: ModelConfig) -> None:
    tier = EngineOptions(host_kv_memory=GIB, kv_memory=GIB)
    assert rank_memory(llama, tier, gpu=True, first=False) == Memory(
        0, 0, 0, GIB, 0, GPU_PROGRAM + (128256 << 10)
    )
    assert rank_memory(llama, replace(tier, host_kv_path="/scratch")).host == 0


def test_no_torch_is_started() -> None:
    check = (
        "import sys, hpc_distkv.start.needs; print(sorted({'torch', 'mpi4py'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
