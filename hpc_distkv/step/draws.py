"""How a token is drawn: by an exponential race, the Gumbel-max trick without logarithms of weights.

Every candidate arrives after an exponentially distributed time, with its weight as the rate, and
the first one is drawn: each with the probability that is its part of all weights. The first of some
tokens arrives after such a time too, with the sum of their weights as the rate. So groups of tokens
race first and then the tokens of the first group, and few times are needed.

A time depends on the weight and on noise, and this on the seed, the position and the number of the
token or group alone. So logits that are rounded otherwise change the token only where two that race
arrive at almost the same time. A place among cumulative weights would be moved by what is rounded
in every token before it.

Noise comes from a tree of SplitMix64 generators (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", 2014), whose n-th number can be made without those before it: a
seed gives each position a generator, and this one gives each token and group a number. That is
arithmetic of 64-bit integers, with the same results in numpy and in torch, on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

Ids = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float64]
Integers = TypeVar("Integers", Ids, Tensor)
"""int64, whose bits stand for those of unsigned integers: products wrap around."""

GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
MIX = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))
NOISE_BITS = 63
GROUP = 256
"""Tokens of consecutive ids that race as one first."""


def split(states: Integers, places: Integers) -> Integers:
    """The numbers at `places`, from 0 on, of the SplitMix64 generators that begin in `states`."""
    mixed = places * GAMMA + (states + GAMMA)
    for shift, factor in MIX:
        mixed = _folded(mixed, shift) * factor
    return _folded(mixed, 31)


def _folded(x: Integers, shift: int) -> Integers:
    return x ^ ((x >> shift) & ((1 << 64 - shift) - 1))  # shifted as an unsigned integer


def draw_keys(rows: Sequence[tuple[int, int]]) -> Ids:
    """The generators `[rows, 1]` of rows' (seed, position)."""
    seeds, positions = np.array(rows, np.int64).reshape(-1, 2).T[:, :, None]
    return split(split(np.zeros_like(seeds), seeds), positions)


def noise(keys: Integers, tokens: Integers) -> Integers:
    """One number in [0, 2⁶³) for each of `tokens`, all equally probable. A group goes by `~` of its
    first token, so that no token has its number."""
    return split(keys, tokens) & ((1 << NOISE_BITS) - 1)


def race(key: Ids, weights: Weights) -> int:
    """The token that is drawn; `weights`: `[vocab]`, not all of them 0; `key`: `[1]`."""
    firsts = np.arange(0, len(weights), GROUP)
    group = firsts[_first(key, ~firsts, np.add.reduceat(weights, firsts))]
    members = weights[group : group + GROUP]
    return int(group + _first(key, np.arange(group, group + len(members)), members))


def _first(key: Ids, ids: Ids, weights: Weights) -> np.intp:
    """The place of the first to arrive. Numbers in (0, 1) → times of rate 1: the smaller, the more
    exact."""
    times = -np.log1p((noise(key, ids) + 0.5) * -(0.5**NOISE_BITS))
    return np.argmax(weights / times)


class Races:
    """`race` of many rows, by tensors of one device."""

    def __init__(self, keys: Tensor, vocab: int) -> None:
        """`keys`: `[rows, 1]`."""
        self._keys, self._vocab = keys, vocab
        firsts = torch.arange(0, vocab, GROUP, device=keys.device)
        self._times = _times(keys, ~firsts)
        self._groups: list[Tensor] = []
        self._members: list[Tensor] = []
        self._rows = 0

    def add(self, weights: Tensor) -> None:
        """The next rows, `[n, vocab]`: their groups race."""
        weights = functional.pad(weights, (0, -self._vocab % GROUP))
        weights = weights.view(len(weights), -1, GROUP)
        times = self._times[self._rows : self._rows + len(weights)]
        group = weights.sum(dim=-1).div_(times).argmax(dim=-1)
        self._groups.append(group)
        self._members.append(weights.take_along_dim(group[:, None, None], 1)[:, 0])
        self._rows += len(weights)

    def winners(self) -> Tensor:
        """The tokens of all rows, `[rows]`."""
        first = torch.cat(self._groups)[:, None] * GROUP
        tokens = first + torch.arange(GROUP, device=first.device)
        rates = torch.cat(self._members) / _times(self._keys, tokens)
        return first[:, 0] + rates.argmax(dim=-1)


def _times(keys: Tensor, ids: Tensor) -> Tensor:
    # As in `_first`.
    return noise(keys, ids).double().add_(0.5).mul_(-(0.5**NOISE_BITS)).log1p_().neg_()
