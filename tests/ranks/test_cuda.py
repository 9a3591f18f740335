"""The engine on a GPU, where there is one: tokens of transformers and the CPU, no hidden waits."""

from __future__ import annotations

import math
import os
import random
from pathlib import Path

import pytest
import torch
from clusters import Outcome, engine_of, run_cluster
from families import VOCABULARY, continuation, prompt, save
from local_ranks import leftovers, open_local
from mpirun import mpirun, run_mpi

from hpc_distkv.comm.binding import bind
from hpc_distkv.comm.transport import TO_CREDITOR, TO_DEBTOR
from hpc_distkv.control.messages.requests import LogitRules, Request, Sampling, pack_tokens
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.decoder import Decoder
from hpc_distkv.model.weights import load_decoder
from hpc_distkv.ranks.rank import EngineOptions
from hpc_distkv.ranks.worker import Worker

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BLOCK = 16
ROWS = [(140, 10), (30, 12), (10, 20), (85, 6), (1, 5)]
"""(prompt, output) tokens."""
FAMILIES = (
    *("llama-llama3", "llama-dynamic", "mistral-window", "qwen3", "qwen3-moe", "phi3-partial"),
    *("gemma2", "gemma3", "gpt2-scaled", "bloom"),
)


def options(num_blocks: int | None = 200, **others) -> EngineOptions:
    sizes = {"max_num_batched_tokens": 64, "max_num_seqs": 16} | others
    return EngineOptions(num_blocks=num_blocks, block_size=BLOCK, threads=1, **sizes)


def on_gpu(model: Decoder, rows: list[Request], settings: EngineOptions) -> Outcome:
    return run_cluster(model, rows, 1, settings, prepare=lambda comms: bind(comms[0], "cuda"))


def loaded(path: Path, device: str, dtype: str = "float32") -> Decoder:
    return load_decoder(path, ModelConfig.from_dir(path), dtype, device)


def greedy(ids: list[list[int]]) -> list[Request]:
    return [
        Request(number, pack_tokens(tokens), Sampling(output))
        for number, (tokens, (_, output)) in enumerate(zip(ids, ROWS, strict=True))
    ]


def drawn(count: int) -> list[Request]:
    """Rows with all that sampling knows."""
    rng, rows = random.Random(3), []
    for number in range(count):
        rules = LogitRules(1.2, 0.3, 0.1, ((5, 1.5),), (7,), 0.02) if number % 3 == 0 else None
        sampling = Sampling(
            12,
            rng.choice([0.0, 0.7, 1.3]),
            rng.choice([1.0, 0.8]),
            rng.choice([0, 9]),
            seed=number,
            logprobs=2 if number % 4 == 0 else None,
            rules=rules,
        )
        rows.append(Request(number, pack_tokens(prompt(rng.randint(1, 90), number)), sampling))
    return rows


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    transformer = save(name, tmp_path)
    ids = [prompt(tokens, seed) for seed, (tokens, _) in enumerate(ROWS)]
    outcome = on_gpu(loaded(tmp_path, "cuda"), greedy(ids), options())
    for number, (tokens, (_, output)) in enumerate(zip(ids, ROWS, strict=True)):
        assert outcome.tokens[number] == continuation(transformer, tokens, output), number


def test_drawn_tokens_equal_those_of_the_cpu(tmp_path: Path) -> None:
    save("llama-llama3", tmp_path)
    rows = drawn(24)
    there = on_gpu(loaded(tmp_path, "cuda"), rows, options())
    here = run_cluster(loaded(tmp_path, "cpu"), rows, 1, options())
    assert there.tokens == here.tokens


def test_recorded_steps_change_no_token(tmp_path: Path) -> None:
    """Rows come, go and are preempted, so steps of many forms are recorded and replayed."""
    save("llama-llama3", tmp_path)
    model, rng = loaded(tmp_path, "cuda"), random.Random(5)
    rows = [
        Request(
            number,
            pack_tokens(prompt(rng.randint(1, 150), number)),
            Sampling(rng.randint(20, 120), rng.choice([0.0, 0.8]), seed=number),
        )
        for number in range(40)
    ]
    eager = on_gpu(model, rows, options(400, enforce_eager=True))
    for blocks in (400, 60):
        replayed = on_gpu(model, rows, options(blocks))
        assert replayed.tokens == eager.tokens


def test_steps_that_are_planned_ahead_change_no_token(tmp_path: Path, monkeypatch) -> None:
    """Rows may end at any token, when the next step has begun with them."""
    save("llama-llama3", tmp_path)
    model, rng = loaded(tmp_path, "cuda"), random.Random(7)
    rows = []
    for number in range(40):
        stop = tuple(rng.sample(range(VOCABULARY), VOCABULARY // 20))
        sampling = Sampling(
            rng.randint(20, 120), rng.choice([0.0, 0.8]), seed=number, stop_token_ids=stop
        )
        rows.append(Request(number, pack_tokens(prompt(rng.randint(1, 150), number)), sampling))
    ahead = on_gpu(model, rows, options(400))
    monkeypatch.setattr(Worker, "_goes_on", lambda worker, plan: False)
    assert on_gpu(model, rows, options(400)).tokens == ahead.tokens


def test_a_pool_is_sized_from_what_the_gpu_has_left(tmp_path: Path) -> None:
    save("llama-llama3", tmp_path)
    rows = drawn(4)
    settings = options(None, gpu_memory_utilization=0.02)
    assert on_gpu(loaded(tmp_path, "cuda"), rows, settings).ids == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("name", "dtype"), [("llama-llama3", "float32"), ("qwen3-moe", "bfloat16")]
)
def test_steps_wait_for_the_gpu_by_nothing_but_polls(name: str, dtype: str, tmp_path: Path) -> None:
    """torch raises where its own calls would block the host until the GPU is done."""
    save(name, tmp_path)
    model, rows = loaded(tmp_path, "cuda", dtype), drawn(24)
    if not model.capturable:
        pytest.skip("torch has no kernel for all experts at once here")
    on_gpu(model, rows, options())

    def strict(comms) -> None:
        bind(comms[0], "cuda")
        torch.cuda.set_sync_debug_mode("error")

    try:
        run_cluster(model, rows, 1, options(policy="queue"), prepare=strict)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["llama-llama3", "gemma3", "bloom"])
@pytest.mark.parametrize("least", [1.0, 5.0, math.inf])
def test_rblocks_in_the_hosts_memory_change_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, least: float
) -> None:
    """Rows are preempted, and one is larger than the pool; queries of so many rows and more are
    attended to on the GPU; torch raises where its own calls would block the host."""
    monkeypatch.setattr("hpc_distkv.start.layout.staged_from", lambda *_: least)
    monkeypatch.setattr("hpc_distkv.step.staging.PIECE_BLOCKS", 3)
    save(name, tmp_path)
    model, rng = loaded(tmp_path, "cuda"), random.Random(5)
    lengths = [rng.randint(1, 100) for _ in range(20)] + [420]
    rows = [
        Request(n, pack_tokens(prompt(length, n)), Sampling(rng.randint(20, 90), 0.8, seed=n))
        for n, length in enumerate(lengths)
    ]
    large = on_gpu(model, rows, options(400))

    def strict(comms) -> None:
        bind(comms[0], "cuda")
        torch.cuda.set_sync_debug_mode("error")

    try:
        settings = options(20, host_kv_memory=1 << 24)
        outcome = run_cluster(model, rows, 1, settings, prepare=strict)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert outcome.tokens == large.tokens
    assert outcome.counters[0].blocks_to_host > 0


def test_what_the_hosts_memory_costs_is_measured(tmp_path: Path) -> None:
    save("llama-llama3", tmp_path)
    (comm,) = open_local(1)
    bind(comm, "cuda")
    engine = engine_of(comm, loaded(tmp_path, "cuda"), options(40, host_kv_memory=1 << 24))
    assert 0 < engine.config.host_staged_from < math.inf


def test_a_rank_sends_to_itself_by_nccl() -> None:
    pytest.importorskip("cupy")
    (comm,) = open_local(1)
    bind(comm, "cuda", transport="nccl")
    sends = [torch.randn(n, device="cuda").to(torch.bfloat16) for n in (1, 1000, 1 << 22)]
    into = [torch.zeros_like(tensor) for tensor in sends]
    before = [tensor.clone() for tensor in sends]
    for channel in (TO_CREDITOR, TO_DEBTOR):
        pending = comm.transport.exchange(
            [(0, tensor) for tensor in sends], [(0, tensor) for tensor in into], channel, channel
        )
        pending.wait("messages to myself")
        for tensor, kept in zip(into, before, strict=True):
            assert torch.equal(tensor, kept)
            tensor.zero_()
    assert comm.transport.drained()
    comm.transport.unite(comm)
    for _ in range(3):  # in order with what is computed, and no host waits
        into[2].zero_()
        sends[2].mul_(2)
        assert comm.transport.stream_ordered.exchange([(0, sends[2])], [(0, into[2])])
        into[2].add_(1)
    assert torch.equal(into[2], before[2] * 8 + 1)
    comm.transport.exchange([(0, sends[0])], [(0, into[0])]).wait("a message after hops")
    assert torch.equal(into[0], sends[0])
    comm.close()
    assert leftovers([comm]) == []


@pytest.mark.skipif(mpirun() is None, reason="needs mpirun")
def test_two_ranks_on_one_gpu_are_refused_unless_they_may_share_it(tmp_path: Path) -> None:
    script = str(Path(__file__).with_name("shared_gpu.py"))
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    env = {"PYTHONPATH": os.pathsep.join(paths)}
    save("llama-llama3", tmp_path)
    refused = run_mpi(2, [script, str(tmp_path), "refuse"], timeout=120, env=env)
    assert refused.returncode == 2, refused.stderr
    assert "would share one GPU" in refused.stderr
    shared = run_mpi(2, [script, str(tmp_path), "share"], timeout=120, env=env)
    assert shared.returncode == 0, shared.stderr
    assert "tokens equal" in shared.stdout
