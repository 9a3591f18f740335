"""Checkpoint files into a decoder, with one copy of the weights in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hpc_distkv.model.config import ModelConfig, dtype_bytes, weight_files
from hpc_distkv.model.decoder import Decoder, Layer
from hpc_distkv.model.errors import ModelError
from hpc_distkv.model.linear import Linear
from hpc_distkv.model.relay import Relay, relayed
from hpc_distkv.model.shard import WHOLE, Cut, Shard

_IGNORED_ENDINGS = ("rotary_emb.inv_freq",)
"""Buffers that old checkpoints saved and the decoder computes."""

_TENSORS_PER_OPENING = 16
"""A mapped file counts as memory in use until it is closed, so it is closed now and then."""


@dataclass(frozen=True)
class _Parameter:
    """One tensor of the checkpoint: where it goes, and the layer that waits for it."""

    view: Tensor
    cut: Cut
    """What of the checkpoint's tensor it holds."""
    linear: Linear | None = None


def load_decoder(
    path: str | Path,
    config: ModelConfig,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    shard: Shard = WHOLE,
    relay: Relay | None = None,
) -> Decoder:
    """The decoder of model directory `path`, in `dtype` (the checkpoint's if None) on `device`, or
    a `shard` of it, of which only its slices are read.

    Reads one tensor at a time into its slice of the fused weights, and packs a layer as soon as it
    is full. Raises ModelError, before any weight is read, for a tensor that is missing, unexpected,
    or of the wrong shape or kind, naming it and its file.

    With a `relay` only one process in each lane reads, and hands what it reads on to the others:
    collective in the lane. If it cannot, all of them raise.
    """
    decoder = _empty_decoder(config, torch_dtype(dtype or config.dtype), device, shard)
    wanted = dict(_parameters(decoder, config))
    packer = _Packer(wanted)
    batches = _read(Path(path), config, wanted)
    if relay is not None:
        batches = relayed(relay, wanted, batches)
    for batch in batches:
        for parameter in batch:
            packer.filled(parameter)
    decoder.head.pack(keep=config.tie_embeddings)
    return decoder


def _read(
    folder: Path, config: ModelConfig, wanted: dict[str, _Parameter]
) -> Iterator[list[_Parameter]]:
    """Fill what is wanted, in that order, a few tensors at a time, which are then wanted no more.
    Checks all files first."""
    files = {file: _checked_names(file, config, wanted) for file in weight_files(folder)}
    place = _check_complete(files, wanted, folder)
    for file, run in groupby(list(wanted), place.__getitem__):
        names = list(run)
        for start in range(0, len(names), _TENSORS_PER_OPENING):
            few = names[start : start + _TENSORS_PER_OPENING]
            with _opened(file) as weights:
                for name in few:
                    wanted[name].cut.read(weights, name, wanted[name].view)
            yield [wanted.pop(name) for name in few]


def random_decoder(
    config: ModelConfig,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Decoder:
    """A decoder with random weights, for benchmarks and tests without a checkpoint.

    Matrices are normal with variance 1 / inputs and norms are 1, so activations keep their size.
    """
    decoder = _empty_decoder(config, torch_dtype(dtype or config.dtype), device, WHOLE)
    generator = torch.Generator(device=decoder.device).manual_seed(seed)
    remaining = dict(_parameters(decoder, config))
    packer = _Packer(remaining)
    for name in list(remaining):
        parameter = remaining.pop(name)
        if parameter.view.dim() == 2:
            scale = 1.0 if name.endswith("embed_tokens.weight") else parameter.view.shape[1] ** -0.5
            parameter.view.normal_(0.0, scale, generator=generator)
        else:
            parameter.view.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        packer.filled(parameter)
    decoder.head.pack(keep=config.tie_embeddings)
    return decoder


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The torch dtype of "float32", "bfloat16" or "float16"; ModelError for others."""
    name = str(dtype).removeprefix("torch.")
    dtype_bytes(name)
    found: torch.dtype = getattr(torch, name)
    return found


class _Packer:
    """Packs a linear layer when the last of its tensors has arrived."""

    def __init__(self, parameters: dict[str, _Parameter]) -> None:
        self._waiting: dict[Linear, int] = {}
        for parameter in parameters.values():
            if parameter.linear is not None:
                self._waiting[parameter.linear] = self._waiting.get(parameter.linear, 0) + 1

    def filled(self, parameter: _Parameter) -> None:
        """Note that the tensor of `parameter` is in place."""
        if parameter.linear is None:
            return
        self._waiting[parameter.linear] -= 1
        if not self._waiting[parameter.linear]:
            parameter.linear.pack()


def _empty_decoder(
    whole: ModelConfig, dtype: torch.dtype, device: str | torch.device, shard: Shard
) -> Decoder:
    """All weights of the shard allocated, none filled."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def linear(rows: int, columns: int, bias: bool) -> Linear:
        return Linear(empty(rows, columns), empty(rows) if bias else None)

    config = shard.config(whole)
    hidden, mlp = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layers = [
        Layer(
            attention_norm=empty(hidden),
            qkv=linear(q + 2 * kv, hidden, config.attention_bias),
            out=linear(hidden, q, config.attention_bias),
            mlp_norm=empty(hidden),
            gate_up=linear(2 * mlp, hidden, config.mlp_bias),
            down=linear(hidden, mlp, config.mlp_bias),
        )
        for _ in range(config.num_layers)
    ]
    vocabulary = len(shard.vocabulary(config.vocab_size)[shard.lane])
    embedding = empty(vocabulary, hidden)
    head = embedding if config.tie_embeddings else empty(vocabulary, hidden)
    return Decoder(config, embedding, layers, norm=empty(hidden), head=Linear(head), shard=shard)


def _parameters(decoder: Decoder, whole: ModelConfig) -> Iterator[tuple[str, _Parameter]]:
    """Every tensor a checkpoint must hold, by its name there; `whole`: what config.json says."""
    config, shard = decoder.config, decoder.shard
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    mlp, hidden = config.intermediate_size, config.hidden_size

    def parameter(name: str, view: Tensor, linear: Linear | None = None) -> _Parameter:
        return _Parameter(view, shard.cut(name, view, whole), linear)

    yield "model.embed_tokens.weight", parameter("embedding", decoder.embedding)
    for index, layer in enumerate(decoder.layers):
        prefix = f"model.layers.{index}."
        yield prefix + "input_layernorm.weight", parameter("norm", layer.attention_norm)
        yield prefix + "post_attention_layernorm.weight", parameter("norm", layer.mlp_norm)
        for linear, module, parts in (
            (layer.qkv, "self_attn", {"q": q, "k": kv, "v": kv}),
            (layer.out, "self_attn", {"out": hidden}),
            (layer.gate_up, "mlp", {"gate": mlp, "up": mlp}),
            (layer.down, "mlp", {"down": hidden}),
        ):
            for name, rows in _rows(parts).items():
                full = f"{prefix}{module}.{'o' if name == 'out' else name}_proj"
                yield f"{full}.weight", parameter(name, linear.weight[rows], linear)
                if linear.bias is not None:
                    yield f"{full}.bias", parameter(name, linear.bias[rows], linear)
    yield "model.norm.weight", parameter("norm", decoder.norm)
    if not config.tie_embeddings:
        yield "lm_head.weight", parameter("head", decoder.head.weight)


def _rows(parts: dict[str, int]) -> dict[str, slice]:
    """The slices of a fused linear layer: its `parts` and how many rows each has."""
    starts = accumulate(parts.values(), initial=0)
    return {
        name: slice(start, start + count)
        for (name, count), start in zip(parts.items(), starts, strict=False)
    }


def _checked_names(file: Path, config: ModelConfig, wanted: dict[str, _Parameter]) -> list[str]:
    """The tensors to read from `file`, checked against what the decoder wants."""
    names = []
    with _opened(file) as weights:
        for name in weights.keys():  # noqa: SIM118 (not a mapping)
            if name.endswith(_IGNORED_ENDINGS):
                continue
            if name == "lm_head.weight" and config.tie_embeddings:
                continue
            if name not in wanted:
                raise ModelError(f"{file}: unexpected tensor {name}; config.json does not fit it")
            stored = weights.get_slice(name)
            shape, expected = tuple(stored.get_shape()), wanted[name].cut.shape
            if shape != expected:
                raise ModelError(
                    f"{file}: tensor {name} has shape {shape}, but config.json asks for {expected}"
                )
            if stored.get_dtype() not in ("F64", "F32", "BF16", "F16"):
                raise ModelError(
                    f"{file}: tensor {name} is {stored.get_dtype()}: quantized weights are not "
                    "supported, only F32, BF16 and F16"
                )
            names.append(name)
    return names


def _check_complete(
    files: dict[Path, list[str]], wanted: dict[str, _Parameter], folder: Path
) -> dict[str, Path]:
    """Tensor → its file."""
    found: dict[str, Path] = {}
    for file, names in files.items():
        for name in names:
            if name in found:
                raise ModelError(f"tensor {name} is in {found[name].name} and in {file}")
            found[name] = file
    missing = [name for name in wanted if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"{folder}: tensor {missing[0]}{more} missing from "
            f"{', '.join(file.name for file in files)}: download the checkpoint again"
        )
    return found


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """`file`, mapped; a damaged one becomes a ModelError."""
    try:
        with safe_open(str(file), framework="pt", device="cpu") as weights:
            yield weights
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} cannot be read ({error}): download it again") from error
