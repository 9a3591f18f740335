"""Log-probabilities of output tokens on the wire."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class TokenLogprobs(NamedTuple):
    """What the model thought of one place in the output, before any rule or temperature."""

    logprob: float
    """Of the token that is there; base e, as all of them."""
    top: list[tuple[int, float]]
    """(token id, its log-probability) of the most probable tokens, best first."""


def record_dtype(top: int) -> np.dtype[Any]:
    """One packed output token with `top` alternatives: 4 + 8 × `top` bytes, little-endian."""
    return np.dtype([("own", "<f4"), ("ids", "<i4", (top,)), ("values", "<f4", (top,))])


def pack_logprobs(
    own: NDArray[np.float32], ids: NDArray[np.int64], values: NDArray[np.float32]
) -> list[bytes]:
    """`own` `[rows]`, `ids` and `values` `[rows, top]` → a record for each row."""
    records = np.empty(len(own), record_dtype(ids.shape[1]))
    records["own"], records["ids"], records["values"] = own, ids, values
    return [record.tobytes() for record in records]


def unpack_logprobs(packed: bytes, top: int) -> list[TokenLogprobs]:
    """The records of an output's tokens, one after the other, → what they say."""
    records = np.frombuffer(packed, record_dtype(top))
    own, ids, values = (records[name].tolist() for name in ("own", "ids", "values"))
    return [
        TokenLogprobs(logprob, list(zip(row_ids, row_values, strict=True)))
        for logprob, row_ids, row_values in zip(own, ids, values, strict=True)
    ]
