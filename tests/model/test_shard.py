"""Shards of a model: who holds what, what is read for it, and that together they are the model."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import logits_of, save_llama
from families import TINY, prompt, save
from local_ranks import leftovers, open_local, run_local
from torch import Tensor

from hpc_distkv.comm.collective.broadcast import LaneBroadcast
from hpc_distkv.comm.collective.group import Group
from hpc_distkv.comm.transport import Comm
from hpc_distkv.model import build, weights
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.decoder import Decoder
from hpc_distkv.model.errors import ModelError
from hpc_distkv.model.family import FAMILIES
from hpc_distkv.model.shard import Cut, ModelShard
from hpc_distkv.model.weights import load_decoder

DIM = 16


def heads_of(cut: Cut) -> range:
    (part,) = cut.parts
    first, last = part.start or 0, cut.shape[0] if part.stop is None else part.stop
    assert first % DIM == last % DIM == 0
    return range(first // DIM, last // DIM)


def config(heads: int, kv_heads: int, mlp: int = 5040) -> ModelConfig:
    family = next(iter(FAMILIES.values()))
    return ModelConfig(family, 2, 64, mlp, heads, kv_heads, DIM, 101, 512)


# Division


@pytest.mark.parametrize(
    ("heads", "kv_heads", "mlp", "sizes"),
    [
        (8, 8, 64, [1, 2, 4, 8]),
        (8, 2, 64, [1, 2, 4, 8]),
        (8, 1, 64, [1, 2, 4, 8]),
        (9, 3, 1536, [1, 3]),
        (9, 3, 1539, [1, 3, 9]),
        (12, 4, 5040, [1, 2, 4, 12]),
        (7, 7, 64, [1]),
    ],
)
def test_sizes_that_work_and_no_others(heads, kv_heads, mlp, sizes):
    whole = config(heads, kv_heads, mlp)
    for lanes in range(1, 20):
        if lanes in sizes:
            ModelShard(0, lanes).config(whole)
            continue
        named = rf"--tensor-parallel-size {lanes} .*sizes that do: {', '.join(map(str, sizes))}$"
        with pytest.raises(ModelError, match=named):
            ModelShard(0, lanes).config(whole)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "lanes"),
    [(8, kv_heads, lanes) for kv_heads in (8, 4, 2, 1) for lanes in (1, 2, 4, 8)]
    + [(12, 4, 2), (12, 4, 4), (12, 4, 12)],
)
def test_every_query_head_is_held_once_beside_its_kv_head(heads, kv_heads, lanes):
    whole = config(heads, kv_heads)
    held: list[int] = []
    for lane in range(lanes):
        shard = ModelShard(lane, lanes)
        own = shard.config(whole)
        q = shard.cut("q", torch.empty(DIM * own.num_heads, 1), whole)
        k = shard.cut("k", torch.empty(DIM * own.num_kv_heads, 1), whole)
        assert (q.shape[0], k.shape[0]) == (DIM * heads, DIM * kv_heads)
        queries, keys = heads_of(q), heads_of(k)
        held += queries
        group = own.num_heads // own.num_kv_heads
        for place, head in enumerate(queries):
            assert keys[place // group] == head // (heads // kv_heads)
    assert held == list(range(heads))


@pytest.mark.parametrize("size", [1, 5, 101, 128])
@pytest.mark.parametrize("lanes", [1, 2, 3, 4])
def test_the_vocabulary_is_divided_as_evenly_as_can_be(size, lanes):
    ranges = ModelShard(0, lanes).vocabulary(size)
    assert [token for ids in ranges for token in ids] == list(range(size))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def test_kv_bytes_shrink_with_the_number_of_lanes():
    whole = config(8, 4)
    per_token = [ModelShard(0, n).config(whole).kv_bytes_per_token() for n in (1, 2, 4, 8)]
    assert per_token == [per_token[0] // n for n in (1, 2, 4, 4)]


# Reading


class Reads:
    """Stands for safe_open and counts the values that leave a file, by tensor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.values: dict[str, int] = {}
        self._open, self._lock = weights.safe_open, threading.Lock()
        monkeypatch.setattr(weights, "safe_open", self)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return OpenFile(self._open(*args, **options), self)

    def add(self, name: str, tensor: Tensor) -> Tensor:
        with self._lock:
            self.values[name] = self.values.get(name, 0) + tensor.numel()
        return tensor


class OpenFile:
    def __init__(self, opened: Any, reads: Reads) -> None:
        self._opened, self._reads = opened, reads

    def __enter__(self) -> OpenFile:
        self._file = self._opened.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def keys(self) -> Sequence[str]:
        return self._file.keys()

    def get_tensor(self, name: str) -> Tensor:
        return self._reads.add(name, self._file.get_tensor(name))

    def get_slice(self, name: str) -> Any:
        return OpenSlice(self._file.get_slice(name), lambda part: self._reads.add(name, part))


class OpenSlice:
    def __init__(self, stored: Any, add: Any) -> None:
        self._stored, self._add = stored, add
        self.get_shape, self.get_dtype = stored.get_shape, stored.get_dtype

    def __getitem__(self, part: Any) -> Tensor:
        return self._add(self._stored[part])


def test_a_rank_reads_its_slices_and_no_more(tmp_path, monkeypatch):
    save_llama(tmp_path, attention_bias=True, mlp_bias=True)  # 6 heads, 2 KV heads, vocabulary 101
    reads = Reads(monkeypatch)
    whole = ModelConfig.from_dir(tmp_path)
    load_decoder(tmp_path, whole)
    everything, reads.values = reads.values, {}
    load_decoder(tmp_path, whole, shard=ModelShard(1, 2))
    layer = "model.layers.1."
    for name, values in everything.items():
        if name.endswith(("norm.weight", "layernorm.weight")):
            assert reads.values[name] == values
        elif name.endswith(("o_proj.bias", "down_proj.bias")):
            assert name not in reads.values, "added on lane 0"
        elif name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert reads.values[name] == 51 * 48
        else:
            assert reads.values[name] == values // 2
    assert f"{layer}self_attn.q_proj.bias" in reads.values


# The parts are the whole


def sharded_logits(path: Path, whole: ModelConfig, tokens: Tensor, lanes: int) -> Tensor:
    def work(comm: Comm) -> Tensor:
        decoder = load_decoder(path, whole, "float32", shard=ModelShard(comm.world.lane, lanes))
        decoder.lanes = Group(comm)
        return logits_of(decoder, tokens, (7, 20))

    return run_local(open_local(lanes, tp=lanes), work)[0]


@pytest.mark.parametrize("lanes", [2, 3, 6])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_those_of_the_whole_model(lanes, tied, tmp_path):
    save_llama(
        tmp_path,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=tied,
        intermediate_size=96,
        num_key_value_heads=6 if lanes == 3 else 2,
    )
    whole = ModelConfig.from_dir(tmp_path)
    tokens = torch.randint(0, 101, (30,))
    expected = logits_of(load_decoder(tmp_path, whole), tokens)
    found = sharded_logits(tmp_path, whole, tokens, lanes)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


# One reader


def tensors(decoder: Decoder) -> list[Tensor]:
    with torch.inference_mode():
        probe = torch.eye(decoder.config.hidden_size)
        return [decoder.embedding, *(layer.qkv(probe) for layer in decoder.layers)]


@pytest.mark.parametrize(("ranks", "tp"), [(5, 1), (6, 2)])
def test_each_shard_is_read_once_and_handed_on(ranks, tp, tmp_path, monkeypatch):
    saved = save_llama(tmp_path, max_shard_size="60KB")
    whole = ModelConfig.from_dir(tmp_path)
    expected = [tensors(load_decoder(tmp_path, whole, shard=ModelShard(n, tp))) for n in range(tp)]
    reads = Reads(monkeypatch)
    comms = open_local(ranks, tp=tp)

    def work(comm: Comm) -> list[Tensor]:
        shard = ModelShard(comm.world.lane, tp)
        return tensors(load_decoder(tmp_path, whole, shard=shard, relay=LaneBroadcast(comm)))

    for rank, found in enumerate(run_local(comms, work)):
        for ours, theirs in zip(found, expected[rank % tp], strict=True):
            assert torch.equal(ours, theirs)
    assert leftovers(comms) == []
    norms = [name for name in reads.values if name.endswith("norm.weight")]
    assert sum(reads.values.values()) == saved.num_parameters() + (tp - 1) * 48 * len(norms)


def test_when_the_reader_cannot_go_on_nobody_waits_for_it(tmp_path):
    save_llama(tmp_path, max_shard_size="60KB")
    whole = ModelConfig.from_dir(tmp_path)
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-100])
    comms = open_local(3)

    def work(comm: Comm) -> str:
        with pytest.raises(ModelError) as error:
            load_decoder(tmp_path, whole, relay=LaneBroadcast(comm))
        return str(error.value)

    said = run_local(comms, work)
    assert f"{last.name} cannot be read" in said[0]
    assert said[1] == said[2] == "the rank that reads the weights for this one could not"
    assert leftovers(comms) == []


# Every family


@pytest.mark.parametrize("name", sorted(TINY))
@pytest.mark.parametrize("lanes", [2, 4])
def test_shards_of_every_family_are_the_whole_model(name, lanes, tmp_path):
    save(name, tmp_path)
    whole = ModelConfig.from_dir(tmp_path)
    if not whole.divides(lanes):
        pytest.skip("does not divide")
    tokens = torch.tensor(prompt(40, 1))
    expected = logits_of(load_decoder(tmp_path, whole, "float32"), tokens)
    found = sharded_logits(tmp_path, whole, tokens, lanes)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("lanes", [2, 4])
def test_shards_of_experts_that_are_computed_at_once_are_the_whole_model(
    lanes, tmp_path, monkeypatch
):
    save("qwen3-moe", tmp_path)
    whole = ModelConfig.from_dir(tmp_path)
    tokens = torch.tensor(prompt(40, 1))
    expected = logits_of(load_decoder(tmp_path, whole, "float32"), tokens)
    asked = []
    monkeypatch.setattr(build, "grouped", lambda config, *_: asked.append(config) or True)
    found = sharded_logits(tmp_path, whole, tokens, lanes)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert {config.intermediate_size for config in asked} == {whole.intermediate_size // lanes}
