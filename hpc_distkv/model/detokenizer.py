"""The text of an output, token by token."""

from __future__ import annotations

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


class Detokenizer:
    """Adds tokens to a text, a whole character at a time.

    A token may hold a part of a character, and a word may be spelled by what stands before it. So
    a few tokens are decoded again behind those before them, and what is new is the difference; it
    is held back while it ends within a character.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int] = ()) -> None:
        """`prompt`: the tokens before the output; the last `CONTEXT` will do."""
        self.text = ""
        """All whole characters so far."""
        self._decode = decode
        self._context = text_before(decode, prompt)
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """One more token. Returns what it adds to the text."""
        self._held.append(token)
        new = text_after(self._decode, self._context, self._held)
        if len(self._held) < MOST_HELD and (not new or new.endswith(BROKEN)):
            return ""
        if new:
            self._context = self._held
        self._held = []
        self.text += new
        return new

    def finish(self) -> str:
        """The whole text: also what was held back. No token may follow."""
        return self.text + text_after(self._decode, self._context, self._held)


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
