"""Which tokens a request has so far, and how often: what penalties go by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


class TokenCounts:
    """How often the output of one request has each token, and which ones its prompt has. Follows
    from the tokens, and counts only those that are new since the last look."""

    def __init__(self, prompt_len: int) -> None:
        self._prompt_len = prompt_len
        self._read = 0
        self._seen: set[int] = set()
        self._output: Counter[int] = Counter()

    def read(self, tokens: Sequence[int]) -> None:
        """`tokens`: of prompt and output so far, more or as many as in the last call; a last one
        that is not known yet (see `TokenSequence.expect`) is left for the next call."""
        end = len(tokens) - (tokens[-1] < 0)
        self._seen.update(tokens[self._read : end])
        self._output.update(tokens[max(self._read, self._prompt_len) : end])
        self._read = end

    @property
    def seen(self) -> npt.NDArray[np.int64]:
        """int64 ids of the tokens in prompt or output."""
        return np.fromiter(self._seen, np.int64, len(self._seen))

    @property
    def output(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """int64 ids of the tokens in the output, and float32 times that they are there."""
        ids = np.fromiter(self._output.keys(), np.int64, len(self._output))
        times = np.fromiter(self._output.values(), np.float32, len(self._output))
        return ids, times
