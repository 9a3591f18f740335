"""How much work a request is."""

from __future__ import annotations

STEP_TOKENS = 16.0
"""Prompt tokens computed in the fixed time of a step, until it was measured."""


def work(start: int, end: float, attention_tokens: float) -> float:
    """Predicted work of the tokens from `start` to `end` of one request, in tokens' worth of linear
    layers: a token at position p also attends to p others, and `attention_tokens` of those cost as
    much as its linear layers."""
    tokens = max(0.0, end - start)
    return tokens * (1 + (start + end) / 2 / attention_tokens)


def kv_tokens(prompt: int, max_tokens: int) -> int:
    """Most tokens whose KV a request can need: the last output token needs none."""
    return prompt + max_tokens - 1


class MeanOutput:
    """What outputs of unfinished requests are expected to be: as large a part of their limits as
    those of finished ones."""

    def __init__(self) -> None:
        self._tokens = self._limits = 0

    def add(self, tokens: int, limit: int) -> None:
        """A request that might make `limit` output tokens ended with `tokens`."""
        self._tokens += tokens
        self._limits += limit

    def expected(self, limit: int) -> float:
        """Output tokens expected of a request that may make `limit`."""
        return limit * self._tokens / self._limits if self._limits else limit
