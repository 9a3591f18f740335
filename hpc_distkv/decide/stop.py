"""Stop strings: an output ends where its text has one, wherever its tokens end."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

from hpc_distkv.control.messages.requests import Sampling
from hpc_distkv.errors import foreign_code
from hpc_distkv.model.detokenizer import Detokenizer


class TextDecoder(Protocol):
    """What the engine needs of a tokenizer, for requests with stop strings."""

    def detokenizer(
        self, prompt: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> Detokenizer:
        """The text behind `prompt`, to be made token by token."""


class StopMatcher:
    """Looks for the stop strings of one request in its text as that grows.

    Knows nothing that does not follow from the tokens: an instance that takes the request over
    makes another one. Of several stop strings, the one that is complete first counts, as if the
    text came one character at a time; hence the cut depends on the text alone.
    """

    def __init__(self, sampling: Sampling, decoder: TextDecoder, prompt: Sequence[int]) -> None:
        self.text_end: int | None = None
        """Characters of the text that belong to the answer, once there is a stop string."""
        self._stop, self._include = sampling.stop, sampling.include_stop
        self._begin = partial(decoder.detokenizer, prompt, sampling.skip_special_tokens)
        self._text: Detokenizer | None = None
        """Begun with the first token: a tokenizer may fail at the prompt already."""
        self._tail = ""
        """The end of the text so far, in which a stop string may have begun."""
        self._longest = max(map(len, sampling.stop))
        self._read = len(prompt)
        self._first = len(prompt) + sampling.min_tokens
        """Tokens from which on a stop string may end."""

    def found(self, tokens: Sequence[int]) -> bool:
        """Whether the text of the output has a stop string; `tokens`: of prompt and output so far,
        more or as many as in the last call. Raises ForeignError for a tokenizer that fails."""
        with foreign_code():
            return self._found(tokens)

    def _found(self, tokens: Sequence[int]) -> bool:
        growing = self._text = self._text or self._begin()
        while self.text_end is None and self._read < len(tokens):
            new = growing.push(tokens[self._read])
            self._read += 1
            if new:
                whole = self._tail + new
                if self._read > self._first:
                    self.text_end = self._search(whole, growing.length - len(whole))
                self._tail = whole[max(0, len(whole) + 1 - self._longest) :]
        return self.text_end is not None

    def _search(self, text: str, begin: int) -> int | None:
        """Where the answer ends if a stop string ends in `text`, behind the tail that it begins
        with; `begin`: characters before it."""
        places = [
            (place + len(stop), place)
            for stop in self._stop
            if (place := text.find(stop, max(0, len(self._tail) + 1 - len(stop)))) >= 0
        ]
        if not places:
            return None
        end, start = min(places)
        return begin + (end if self._include else start)
