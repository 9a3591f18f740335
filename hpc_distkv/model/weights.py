"""Checkpoint files into a decoder, with one copy of the weights in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hpc_distkv.model.build import empty_decoder
from hpc_distkv.model.config import ModelConfig, dtype_bytes, dtype_name
from hpc_distkv.model.decoder import Decoder
from hpc_distkv.model.errors import ModelError
from hpc_distkv.model.files import weight_files
from hpc_distkv.model.shard import WHOLE, ModelShard
from hpc_distkv.model.slots import Slot, slots

_IGNORED_ENDINGS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Buffers that old checkpoints saved and the decoder computes."""

_TENSORS_PER_OPENING = 16
"""A mapped file counts as memory in use until it is closed, so it is closed now and then."""


class Relay(Protocol):
    """The processes that hold the same shard, of which the first one reads."""

    @property
    def reads(self) -> bool:
        """Whether this one does."""

    def broadcast(self, tensor: Tensor) -> None:
        """The reader's contiguous `tensor` to all, in place. Collective."""


def load_decoder(
    path: str | Path,
    config: ModelConfig,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    shard: ModelShard = WHOLE,
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
    decoder = empty_decoder(config, torch_dtype(dtype or config.dtype), torch.device(device), shard)
    wanted = dict(slots(decoder, config))
    batches = _read(Path(path), config, wanted)
    if relay is not None:
        batches = _relayed(relay, wanted, batches)
    return _packed(decoder, config, wanted, batches)


def _read(folder: Path, config: ModelConfig, wanted: dict[str, Slot]) -> Iterator[list[Slot]]:
    """Fill the slots that are wanted, in that order, and take them from `wanted`, a few at a time.
    Checks all files first."""
    files = {file: _checked_names(file, config, wanted) for file in weight_files(folder)}
    place = _check_complete(files, wanted, folder)
    for file, run in groupby(list(wanted), lambda name: place[name][0]):
        for few in _batched(list(run), _TENSORS_PER_OPENING):
            with _opened(file) as weights:
                for name in few:
                    wanted[name].fill(wanted[name].cut.read(weights, place[name][1]))
            yield [wanted.pop(name) for name in few]


def random_decoder(
    config: ModelConfig,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    shard: ModelShard = WHOLE,
) -> Decoder:
    """A decoder, or a shard of one, with random weights, for benchmarks and tests without a
    checkpoint.

    Matrices are normal with variance 1 / inputs, norms are 1 and biases 0, so activations keep
    their size.
    """
    decoder = empty_decoder(config, torch_dtype(dtype or config.dtype), torch.device(device), shard)
    generator = torch.Generator(device=decoder.device).manual_seed(seed)
    wanted = dict(slots(decoder, config))

    def random() -> Iterator[list[Slot]]:
        for name in list(wanted):
            slot = wanted.pop(name)
            slot.fill_randomly(generator)
            yield [slot]

    return _packed(decoder, config, wanted, random())


def _packed(
    decoder: Decoder,
    config: ModelConfig,
    wanted: Mapping[str, Slot],
    filled: Iterator[list[Slot]],
) -> Decoder:
    """The decoder, once all slots that are `wanted` have been `filled`. A linear layer is packed
    when the last of its tensors has come."""
    waiting = Counter(slot.linear for slot in wanted.values() if slot.linear)
    for batch in filled:
        for slot in batch:
            if slot.linear is not None:
                waiting[slot.linear] -= 1
                if not waiting[slot.linear]:
                    slot.linear.pack()
    decoder.head.pack(keep=config.tie_embeddings)
    return decoder


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The torch dtype of "float32", "bfloat16" or "float16"; ModelError for others."""
    name = dtype_name(dtype)
    dtype_bytes(name)
    found: torch.dtype = getattr(torch, name)
    return found


def _relayed(
    relay: Relay, wanted: dict[str, Slot], filled: Iterator[list[Slot]]
) -> Iterator[list[Slot]]:
    """What is `wanted`, alike in all processes, in that order, in batches: on the reader those that
    it has `filled` and taken from `wanted`, elsewhere what it hands on. Each batch is

        its size → its tensors

    and a size of 0 says that the reader could not go on: then all raise ModelError, so nobody waits
    for what will not come.
    """
    size = torch.zeros(1, dtype=torch.int64)
    while wanted:
        batch: list[Slot] = []
        try:
            if relay.reads:
                batch = next(filled)
        finally:
            size[0] = len(batch)
            relay.broadcast(size)
        if not relay.reads:
            batch = [wanted.pop(name) for name in list(islice(wanted, int(size)))]
        if not batch:
            raise ModelError("the rank that reads the weights for this one could not")
        for slot in batch:
            tensor = slot.view.contiguous()
            relay.broadcast(tensor)
            if tensor is not slot.view:
                slot.view.copy_(tensor)
        yield batch


def _batched(names: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(names), size):
        yield names[start : start + size]


def _checked_names(file: Path, config: ModelConfig, wanted: Mapping[str, Slot]) -> dict[str, str]:
    """The tensors to read from `file`, checked against what the decoder wants: name in the file →
    full name."""
    names = {}
    family = config.family
    tied_head = family.names["head"] + ".weight" if config.tie_embeddings else None
    with _opened(file) as weights:
        for name in weights.keys():  # noqa: SIM118 (not a mapping)
            if name.endswith(_IGNORED_ENDINGS) or name == tied_head:
                continue
            full = name if name in wanted else family.prefix + name
            if full not in wanted:
                raise ModelError(f"{file}: unexpected tensor {name}; config.json does not fit it")
            stored = weights.get_slice(name)
            shape, expected = tuple(stored.get_shape()), wanted[full].cut.shape
            if shape != expected:
                raise ModelError(
                    f"{file}: tensor {name} has shape {shape}, but config.json asks for {expected}"
                )
            if stored.get_dtype() not in ("F64", "F32", "BF16", "F16"):
                raise ModelError(
                    f"{file}: tensor {name} is {stored.get_dtype()}: quantized weights are not "
                    "supported, only F32, BF16 and F16"
                )
            names[name] = full
    return names


def _check_complete(
    files: Mapping[Path, Mapping[str, str]], wanted: Mapping[str, Slot], folder: Path
) -> dict[str, tuple[Path, str]]:
    """Full name → file, and name there."""
    found: dict[str, tuple[Path, str]] = {}
    for file, names in files.items():
        for stored, name in names.items():
            if name in found:
                raise ModelError(f"tensor {name} is in {found[name][0].name} and in {file}")
            found[name] = file, stored
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
