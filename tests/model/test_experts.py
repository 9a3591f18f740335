"""Mixtures of experts, computed one by one and at once, against float64 and transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dense import logits_of, reference_logits
from families import prompt, save
from torch import Tensor
from torch.nn import functional

from hpc_distkv.model import build
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.decoder import nothing
from hpc_distkv.model.layers import Experts, Linear, Mlp, grouped
from hpc_distkv.model.weights import load_decoder

COUNT, PER_TOKEN, HIDDEN, INNER = 12, 4, 32, 24
AT_ONCE = [False, True]
Weights = tuple[Tensor, Tensor, Tensor]
"""Of the router [experts, hidden], all `up` [experts, 2 · inner, hidden], and all `down` [experts,
hidden, inner]."""


def weights_of(seed: int = 0) -> Weights:
    shapes = ((COUNT, HIDDEN), (COUNT, 2 * INNER, HIDDEN), (COUNT, HIDDEN, INNER))
    generator = torch.Generator().manual_seed(seed)
    router, up, down = (torch.randn(shape, generator=generator) * 0.3 for shape in shapes)
    return router, up, down


def experts_of(weights: Weights, at_once: bool, per_token: int = PER_TOKEN) -> Experts:
    router, up, down = weights
    pairs = zip(up, down, strict=True)
    mlps = [Mlp(Linear(one), Linear(other), "silu", gated=True) for one, other in pairs]
    return Experts(Linear(router), mlps, per_token, True, (up, down) if at_once else None)


def rounded(weights: Weights) -> Weights:
    """To bfloat16, with scores of the router so far apart that what rounding makes it choose
    otherwise weighs little."""
    router, up, down = weights
    return (router * 8).bfloat16(), up.bfloat16(), down.bfloat16()


def rows_of(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def by_definition(weights: Weights, x: Tensor, per_token: int = PER_TOKEN) -> Tensor:
    """Token by token and expert by expert, in float64."""
    router, up, down = (weight.double() for weight in weights)
    out = []
    for token in x.double():
        shares = (router @ token).softmax(0)
        chosen = shares.argsort(descending=True)[:per_token].tolist()
        total = sum(shares[expert] for expert in chosen)
        mixed = torch.zeros(HIDDEN, dtype=torch.float64)
        for expert in chosen:
            gate, wide = (up[expert] @ token).split(INNER)
            mixed += shares[expert] / total * (down[expert] @ (functional.silu(gate) * wide))
        out.append(mixed)
    return torch.stack(out)


@pytest.mark.parametrize("at_once", AT_ONCE)
@pytest.mark.parametrize("count", [1, 2, 5, 64])
def test_what_comes_out_is_the_weighted_sum_of_the_experts_chosen(count, at_once):
    weights, x = weights_of(), rows_of(count)
    found = experts_of(weights, at_once)(x, nothing)
    torch.testing.assert_close(found.double(), by_definition(weights, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("at_once", AT_ONCE)
def test_bfloat16_loses_what_rounding_loses(at_once):
    weights, x = rounded(weights_of()), rows_of(200).bfloat16()
    truth = by_definition(weights, x)
    error = experts_of(weights, at_once)(x, nothing).double() - truth
    assert error.norm() < 0.02 * truth.norm()


@pytest.mark.parametrize("at_once", AT_ONCE)
@pytest.mark.parametrize("first", [0, 3, COUNT - PER_TOKEN])
def test_all_tokens_may_go_to_the_same_experts_and_none_to_the_others(first, at_once):
    router, *stacks = weights_of()
    x = rows_of(30).abs()
    router = router.sign().abs() * 0.01  # positive rows like x are: then the larger weight wins
    router[first : first + PER_TOKEN] += torch.arange(1, PER_TOKEN + 1)[:, None] * 0.1
    weights = router, *stacks
    _, chosen = experts_of(weights, at_once)._route(x)
    assert set(chosen.flatten().tolist()) == set(range(first, first + PER_TOKEN))
    found = experts_of(weights, at_once)(x, nothing)
    torch.testing.assert_close(found.double(), by_definition(weights, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("at_once", AT_ONCE)
@pytest.mark.parametrize("per_token", [1, COUNT])
def test_one_expert_each_and_all_experts_each(per_token, at_once):
    weights, x = weights_of(), rows_of(9)
    found = experts_of(weights, at_once, per_token)(x, nothing).double()
    expected = by_definition(weights, x, per_token)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def exact_products(seed: int = 4) -> Weights:
    """Every output of a linear layer has one input alone, so its bits are nobody's choice; those
    of sums over experts are left."""
    router = torch.eye(COUNT, HIDDEN)
    scale = rows_of(2 * COUNT, seed)
    up = torch.zeros(COUNT, 2 * INNER, HIDDEN)
    down = torch.zeros(COUNT, HIDDEN, INNER)
    for expert in range(COUNT):
        for row in range(2 * INNER):
            up[expert, row, (row + expert) % HIDDEN] = scale[expert, row % HIDDEN]
        for row in range(HIDDEN):
            down[expert, row, (row * 5 + expert) % INNER] = scale[COUNT + expert, row]
    return router, up, down


@pytest.mark.parametrize("at_once", AT_ONCE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_of_a_sum_over_experts_do_not_depend_on_other_rows(dtype, at_once):
    router, up, down = (weight.to(dtype) for weight in exact_products())
    experts = experts_of((router, up, down), at_once)
    x = rows_of(150).to(dtype)
    everything = experts(x, nothing)
    torch.testing.assert_close(experts(x, nothing), everything, rtol=0, atol=0)
    generator = torch.Generator().manual_seed(5)
    for count in (1, 1, 2, 3, 17, 64, 140):
        some = torch.randperm(len(x), generator=generator)[:count]
        torch.testing.assert_close(experts(x[some], nothing), everything[some], rtol=0, atol=0)


@pytest.mark.parametrize("at_once", AT_ONCE)
def test_neither_rows_nor_weights_are_changed(at_once):
    weights, x = weights_of(), rows_of(20)
    before = [tensor.clone() for tensor in (*weights, x)]
    experts_of(weights, at_once)(x, nothing)
    for tensor, was in zip((*weights, x), before, strict=True):
        torch.testing.assert_close(tensor, was, rtol=0, atol=0)


def test_at_once_asks_for_no_number_of_the_device():
    """Tensors on `meta` have none."""
    weights = tuple(weight.to("meta", torch.bfloat16) for weight in weights_of())
    x = rows_of(20).to("meta", torch.bfloat16)
    together, apart = experts_of(weights, True), experts_of(weights, False)
    assert together(x, nothing).shape == x.shape
    assert not together.waits
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        apart(x, nothing)
    assert apart.waits


@pytest.mark.parametrize("name", ["qwen3-moe", "qwen3-moe-normalised"])
def test_at_once_the_logits_are_those_of_transformers(name, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(build, "grouped", lambda *_: True)
    model = save(name, tmp_path)
    decoder = load_decoder(tmp_path, ModelConfig.from_dir(tmp_path), "float32")
    assert decoder.capturable
    tokens = torch.tensor(prompt(90, 1))
    torch.testing.assert_close(
        logits_of(decoder, tokens, (37,)), reference_logits(model, tokens), rtol=0, atol=1e-4
    )


# Where


@pytest.fixture
def hopper(monkeypatch) -> Callable[[tuple[int, int]], None]:
    """A build for CUDA and a GPU that has a kernel; or another, when called."""

    def be(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    be((9, 0))
    return be


@pytest.fixture
def config(tmp_path: Path) -> ModelConfig:
    save("qwen3-moe", tmp_path)
    return ModelConfig.from_dir(tmp_path)


CUDA, BFLOAT16 = torch.device("cuda"), torch.bfloat16


def test_where_torch_has_a_kernel_it_is_taken(hopper, config):
    assert grouped(config, BFLOAT16, CUDA)
    hopper((10, 3))
    assert grouped(config, BFLOAT16, CUDA)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (11, 0), (12, 0)])
def test_on_other_gpus_torch_would_wait(capability, hopper, config):
    hopper(capability)
    assert not grouped(config, BFLOAT16, CUDA)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 68}, {"intermediate_size": 12}, {"mlp_bias": True}, {"num_experts": 1024}],
)
def test_it_does_not_serve_every_shape(changes, config):
    assert not grouped(replace(config, **changes), BFLOAT16, CUDA)


@pytest.mark.usefixtures("hopper")
def test_it_serves_bfloat16_on_cuda_in_a_new_torch_alone(config, monkeypatch):
    assert not grouped(config, torch.float16, CUDA)
    assert not grouped(config, torch.float32, CUDA)
    assert not grouped(config, BFLOAT16, torch.device("cpu"))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not grouped(config, BFLOAT16, CUDA)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delattr(functional, "grouped_mm")
    assert not grouped(config, BFLOAT16, CUDA)


# On a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.inference_mode()
def test_what_is_recorded_as_a_graph_serves_every_routing(config):
    if not grouped(config, BFLOAT16, CUDA):
        pytest.skip("no kernel for all experts")
    weights = tuple(weight.to(CUDA) for weight in rounded(weights_of()))
    experts, x = experts_of(weights, at_once=True), rows_of(64).to(CUDA, BFLOAT16)
    experts(x, nothing)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = experts(x, nothing)
    for seed in range(5):
        x.copy_(rows_of(64, seed))
        graph.replay()
        torch.testing.assert_close(out, experts(x, nothing), rtol=0, atol=0)
        truth = by_definition(tuple(w.cpu() for w in weights), x.cpu())
        assert (out.cpu().double() - truth).norm() < 0.02 * truth.norm()
