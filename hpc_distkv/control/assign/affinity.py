"""Which instances were given which prefixes of prompts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from hpc_distkv.control.messages.requests import Request

STEP = 32
"""Prefixes of a prompt are looked at whose lengths are 1/32 apart: few, however long it is."""
MOST_KEYS = 1 << 17
"""Prefixes that are remembered; those given longest ago are forgotten first."""
MOST_HOLDERS = 8
"""Instances that are remembered for each, the last ones."""


class Affinity:
    """The gManager's guess of which instances have the rBlocks of which prefixes: those that were
    given a request with it last. Whether they still have them only they know."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._holders: OrderedDict[bytes, list[int]] = OrderedDict()
        """Key of a prefix → the instances."""

    def find(self, request: Request) -> tuple[list[int], int]:
        """The instances that have the longest prefix of the request's prompt, and its tokens."""
        lengths = list(self._lengths(request))
        keys = request.prefix_keys(lengths)
        for key, tokens in zip(reversed(keys), reversed(lengths[: len(keys)]), strict=True):
            if key in self._holders:
                return self._holders[key], tokens
        return [], 0

    def give(self, request: Request, instance: int) -> None:
        """The request goes to `instance`."""
        for key in request.prefix_keys(self._lengths(request)):
            holders = self._holders.setdefault(key, [])
            if instance in holders:
                holders.remove(instance)
            holders.append(instance)
            del holders[:-MOST_HOLDERS]
            self._holders.move_to_end(key)
        while len(self._holders) > MOST_KEYS:
            self._holders.popitem(last=False)

    def _lengths(self, request: Request) -> Iterator[int]:
        blocks = 1
        while blocks * self._block_size < request.prompt_len:
            yield blocks * self._block_size
            blocks += 1 + blocks // STEP
