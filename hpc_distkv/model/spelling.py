"""How the pieces of a vocabulary spell a text: which bytes each stands for."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from typing import Any

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""How pieces of SentencePiece spell a space."""
_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")
"""How they spell a byte that is not in a piece."""
_BYTE_LEVEL = ["ByteLevel"]
_SENTENCE_PIECE = ["Replace", "ByteFallback", "Fuse"]
"""Steps of the decoders of Llama 2, Mistral, Gemma, Phi-3 and Yi; some strip the first space."""
_SPACES = {"pattern": {"String": SPACE}, "content": " "}
_FIRST_SPACE = {"content": " ", "start": 1, "stop": 0}


def _byte_letters() -> dict[str, bytes]:
    """Letter → byte in pieces of byte-level BPE: printable Latin-1 stands for itself, the other
    bytes have letters from U+0100 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters = itertools.count(0x100)
    return {chr(b if b in printable else next(letters)): bytes([b]) for b in range(256)}


_BYTES = _byte_letters()


@dataclass(frozen=True)
class Spelling:
    """That of one tokenizer, as its decoder tells."""

    byte_level: bool = False
    """Every letter of a piece is a byte."""
    exact: bool = False
    """A text is the bytes of its tokens, one after the other; else what a token adds depends on
    those before it, and only the decoder knows."""
    drops_space: bool = False
    """But for a space at its begin, where it has one."""

    @classmethod
    def of(cls, decoder: Any) -> Spelling:
        """Of the decoder of a `tokenizers.Tokenizer`; None: pieces are words."""
        if decoder is None:
            return cls()
        state = json.loads(decoder.__getstate__())  # not to be had otherwise without the vocabulary
        steps = state["decoders"] if state["type"] == "Sequence" else [state]
        kinds = [step["type"] for step in steps]
        if kinds == _BYTE_LEVEL:
            return cls(byte_level=True, exact=True)
        drops = (
            kinds[len(_SENTENCE_PIECE) :] == ["Strip"] and _FIRST_SPACE.items() <= steps[-1].items()
        )
        exact = kinds == _SENTENCE_PIECE + ["Strip"] * drops and _SPACES.items() <= steps[0].items()
        return cls("ByteLevel" in kinds, exact, drops)

    def spell(self, piece: str, added: bool) -> bytes:
        """What a piece stands for, in UTF-8: maybe a part of a character. `added`: it was added to
        the vocabulary as it is."""
        if self.byte_level:
            if added:
                return piece.encode()
            return b"".join(_BYTES.get(letter) or letter.encode() for letter in piece)
        if byte := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        return piece.replace(SPACE, " ").encode()
