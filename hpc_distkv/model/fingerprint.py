"""What of a model decides the tokens of an answer: two runs that agree in it may share results.

Left out is what a model directory may change without any other token: its place and name, how
weights are cut into files, and keys of its JSON files that this program does not read. So is the
number of ranks, with tensor parallelism too: it moves sums by rounding alone, as lending does.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from hpc_distkv.model.chat import find_template
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.errors import ModelError
from hpc_distkv.model.family import Family
from hpc_distkv.model.files import weight_files
from hpc_distkv.model.safetensors_header import StoredTensor, read_header
from hpc_distkv.model.tokenizer import Tokenizer
from hpc_distkv.regular import open_regular, read_regular

SAMPLE = 4096
"""Bytes of a tensor that are read at one place."""
MOST_SAMPLES = 8
"""Places of a tensor."""
SAMPLES = 8192
"""Places of all tensors, if that is one of each at least."""
MOST_TENSORS = 65536
"""That are looked into. Of more, as large mixtures of experts may have, those with the lowest
hashes of their names: the rest counts with names and shapes."""
_READERS = 16
"""Reads at once: on a parallel file system a read takes a millisecond, however short."""


def model_fingerprint(
    folder: Path,
    config: ModelConfig,
    tokenizer: Tokenizer,
    eos_ids: Sequence[int],
    dtype: str,
    weightless: bool = False,
) -> dict[str, Any]:
    """Name → what a run with another value must not go on with, as JSON values.

    `eos_ids` end an answer; `dtype` is that of weights and activations; `weightless`: the weights
    are random. Raises ModelError.
    """
    template = find_template(folder, tokenizer.settings)
    try:
        words = _digest(read_regular(folder / "tokenizer.json"))
        weights = "random" if weightless else weights_digest(weight_files(folder))
    except OSError as error:
        raise ModelError(f"{folder} cannot be read: {error}") from error
    return {
        "config": _settings(config, left_out=_NOT_OF_TOKENS),
        "tokenizer": words,
        "special_tokens": _digest(repr(tokenizer.special).encode()),
        "chat_template": None
        if template is None
        else _digest(template.encode("utf-8", "surrogatepass")),
        "eos_token_ids": sorted(eos_ids),
        "dtype": dtype,
        "weights": weights,
    }


_NOT_OF_TOKENS = ("max_position", "dtype", "eos_token_ids", "generation", "fingerprint")
"""Fields of ModelConfig that stand elsewhere, or only say how long rows may be."""


def weights_digest(files: Sequence[Path]) -> str:
    """Hash of the names, kinds and shapes of all tensors, and of samples of their bytes: of at most
    `SAMPLES` places, or `MOST_TENSORS` where there are so many tensors, each of `SAMPLE` bytes. It
    does not depend on which file has which tensor. Raises ModelError and OSError."""
    with ExitStack() as opened, ThreadPoolExecutor(_READERS) as pool:
        tensors = []
        for file in files:
            weights = opened.enter_context(open_regular(file))
            tensors += read_header(weights.fileno(), file)
        tensors.sort()
        looked = sorted(
            tensors, key=lambda tensor: _digest(tensor.name.encode("utf-8", "surrogatepass"))
        )
        looked = looked[:MOST_TENSORS]
        places = max(1, min(MOST_SAMPLES, SAMPLES // max(1, len(looked))))
        cuts = [looked[n::_READERS] for n in range(_READERS)]
        parts = list(pool.map(lambda cut: _samples(cut, places), cuts))
    names = [(tensor.name, tensor.kind, tensor.shape) for tensor in tensors]
    return _digest(repr(names).encode("utf-8", "surrogatepass") + b"".join(parts))


def _samples(tensors: Sequence[StoredTensor], places: int) -> bytes:
    """Hash of what stands at so many places of each tensor, spread evenly, both ends among them, or
    in the middle if it is one; of a small tensor all."""
    digest = hashlib.blake2b()
    for tensor in tensors:
        size = tensor.end - tensor.begin
        if size <= places * SAMPLE:
            digest.update(os.pread(tensor.fd, size, tensor.begin))
            continue
        last = size - SAMPLE
        for place in range(places):
            offset = last * place // (places - 1) if places > 1 else last // 2
            digest.update(os.pread(tensor.fd, SAMPLE, tensor.begin + offset))
    return digest.digest()


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _settings(record: Any, left_out: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults: so a field that a later version
    adds changes nothing until a model uses it."""
    changed = {}
    for field in fields(record):
        value = getattr(record, field.name)
        default = field.default
        if default is MISSING and field.default_factory is not MISSING:
            default = field.default_factory()
        if field.name not in left_out and value != default:
            changed[field.name] = _plain(value)
    return changed


def _plain(value: Any) -> Any:
    if isinstance(value, Family):
        return value.architecture
    return _settings(value) if is_dataclass(value) else value
