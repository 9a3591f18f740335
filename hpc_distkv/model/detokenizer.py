"""The text of an output, token by token.

What is shown is never taken back, and never a part of a character. So the text depends on the
tokens alone, whatever is asked beside it: a row's text is read here only.
"""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

CONTEXT = 6
"""Tokens before the output that decide how its first token is spelled: some tokenizers drop the
space of a text's first word."""
MOST_HELD = 16
"""Tokens that may wait for the rest of a character; more of them are no text anyway."""
BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are no character, or not yet a whole one."""

Decode = Callable[[Sequence[int]], str]
"""Token ids → their text."""
Spell = Callable[[int], bytes]
"""Token id → its part of the text in UTF-8, nothing for what is skipped."""


class Detokenizer(ABC):
    """Adds tokens to a text, a whole character at a time. Half a character at the end is no part of
    the text, as in vLLM."""

    def __init__(self) -> None:
        self.length = 0
        """Of the text so far, in characters."""
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """All whole characters so far."""
        return "".join(self._parts)

    def push(self, token: int) -> str:
        """One more token. Returns what it adds to the text."""
        return self._add(self._grow(token))

    def extend(self, tokens: Sequence[int]) -> str:
        """Many more tokens. Returns the whole text."""
        for token in tokens:
            self.push(token)
        return self.text

    def _add(self, new: str) -> str:
        self._parts.append(new)
        self.length += len(new)
        return new

    @abstractmethod
    def _grow(self, token: int) -> str:
        """What one more token adds to the text."""


class SpellingDetokenizer(Detokenizer):
    """For tokens that each stand for some bytes, whatever stands beside them: byte-level BPE and
    SentencePiece with bytes for what is in no piece. Bytes that are no UTF-8 become U+FFFD."""

    def __init__(self, spell: Spell, drop_space: bool = False) -> None:
        """`drop_space`: a space at the begin of the text is no part of it."""
        super().__init__()
        self._spell = spell
        self._drop_space = drop_space
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def extend(self, tokens: Sequence[int]) -> str:
        """Many more tokens, at once. Returns the whole text."""
        self._add(self._read(b"".join(map(self._spell, tokens))))
        return self.text

    def _grow(self, token: int) -> str:
        return self._read(self._spell(token))

    def _read(self, spelled: bytes) -> str:
        new = self._characters.decode(spelled)
        if self._drop_space and new:
            self._drop_space = False
            new = new.removeprefix(" ")
        return new


class DecodingDetokenizer(Detokenizer):
    """For any other tokenizer: a word may be spelled by what stands before it, so a few tokens are
    decoded again behind those before them, and what is new is the difference; it is held back while
    it ends within a character."""

    def __init__(self, decode: Decode, prompt: Sequence[int] = ()) -> None:
        """`prompt`: the tokens before the output; the last `CONTEXT` will do."""
        super().__init__()
        self._decode = decode
        self._context = text_before(decode, prompt)
        self._held: list[int] = []

    def _grow(self, token: int) -> str:
        self._held.append(token)
        new = text_after(self._decode, self._context, self._held)
        if len(self._held) < MOST_HELD and (not new or new.endswith(BROKEN)):
            return ""
        if new:
            self._context = self._held
        self._held = []
        return new


def text_before(decode: Decode, prompt: Sequence[int]) -> list[int]:
    """The last tokens of a prompt behind which its output is decoded: none is a part of a
    character."""
    for start in range(max(0, len(prompt) - CONTEXT), len(prompt)):
        context = list(prompt[start:])
        if BROKEN not in decode(context):
            return context
    return []


def text_after(decode: Decode, context: Sequence[int], tokens: Sequence[int]) -> str:
    """What `tokens` add to the text of `context`."""
    if not context or not tokens:
        return decode(tokens) if tokens else ""
    before, whole = decode(context), decode([*context, *tokens])
    return whole.removeprefix(before) if whole.startswith(before) else decode(tokens)
