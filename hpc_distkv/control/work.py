"""How much work a row is."""

from __future__ import annotations


def work(start: int, end: float, attention_tokens: float) -> float:
    """Predicted work of the tokens from `start` to `end` of one row, in tokens' worth of linear
    layers: a token at position p also attends to p others, and `attention_tokens` of those cost as
    much as its linear layers."""
    tokens = max(0.0, end - start)
    return tokens * (1 + (start + end) / 2 / attention_tokens)


class MeanOutput:
    """What outputs of rows not finished yet are expected to be: as long as those that are."""

    def __init__(self) -> None:
        self._rows = self._tokens = 0

    def add(self, tokens: int) -> None:
        """A row ended with so many output tokens."""
        self._rows += 1
        self._tokens += tokens

    def expected(self, limit: int) -> float:
        """Output tokens of a row that may make `limit`."""
        return min(limit, self._tokens / self._rows) if self._rows else limit
