"""Tokenizers of tests whose text is known to a decoder only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial

from hpc_distkv.model.detokenizer import DecodingDetokenizer, Detokenizer


class Decoding(ABC):
    """What an engine needs of a tokenizer, from `decode` alone."""

    @abstractmethod
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Token ids → text."""

    def detokenizer(
        self, prompt: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> Detokenizer:
        """The text behind `prompt`, to be made token by token."""
        decode = partial(self.decode, skip_special_tokens=skip_special_tokens)
        return DecodingDetokenizer(decode, prompt)
