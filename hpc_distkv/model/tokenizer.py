"""Text to token ids and back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from hpc_distkv.errors import ForeignError, foreign_code
from hpc_distkv.model.detokenizer import (
    CONTEXT,
    DecodingDetokenizer,
    Detokenizer,
    SpellingDetokenizer,
)
from hpc_distkv.model.errors import ModelError, TooLongError
from hpc_distkv.model.files import has_file, read_optional_json, read_text
from hpc_distkv.model.special_tokens import CONFIG, TOKEN_FIELDS, NamedTokens
from hpc_distkv.model.spelling import Spelling

FIRST_LOOK = 8
"""Characters per token that one looks at first, to see whether a text is too long."""
MARGIN = 1024
"""Tokens that a prefix of a text may have more than the same characters within the text, since its
last word is cut."""


class Tokenizer:
    """The tokenizer of a model directory: tokenizer.json and tokenizer_config.json."""

    def __init__(self, path: str | Path, model_vocab: int | None = None) -> None:
        """Read the tokenizer of directory `path`, for a model of `model_vocab` tokens. Raises
        ModelError if there is no usable one."""
        folder = Path(path)
        file = folder / "tokenizer.json"
        self.settings = read_optional_json(folder / CONFIG)
        named = NamedTokens.read(folder, self.settings)
        self.special_tokens = named.names
        """Named special tokens, such as {"bos_token": "<s>"}."""
        self._fast = _fast(file, named)
        added = self._fast.get_added_tokens_decoder()
        self._added = frozenset(added)
        self._skipped = frozenset(id for id, token in added.items() if token.special)
        """By `skip_special_tokens`."""
        if model_vocab is not None:
            self._check_vocabulary(file, model_vocab)
        self._pieces: dict[int, bytes] = {}
        """Of the tokens that `token_bytes` was asked for: with log-probabilities twenty a token. On
        rank 0 three threads fill it, without a lock: whoever sets an item sets the same value."""
        self._spelling = Spelling.of(self._fast.decoder)
        end = self.special_tokens.get("eos_token")
        self.eos_token_id: int | None = None if end is None else self._fast.token_to_id(end)

    @property
    def special(self) -> list[tuple[Any, ...]]:
        """All that is no text of the vocabulary: names of tokens; and of added tokens ids, texts,
        and how they are found."""
        added = self._fast.get_added_tokens_decoder()
        found = [
            (id, *(getattr(token, field) for field in TOKEN_FIELDS)) for id, token in added.items()
        ]
        return [*sorted(self.special_tokens.items()), *sorted(found)]

    def _check_vocabulary(self, file: Path, size: int) -> None:
        """Refuse another model's tokenizer. A smaller vocabulary is that of a model whose own is
        padded, and tokens that were added to it may lie beyond and are never used."""
        if self._fast.get_vocab_size(with_added_tokens=False) <= size:
            return
        ids = self._fast.get_vocab(with_added_tokens=False).values()
        if beyond := [id for id in ids if id >= size and id not in self._added]:
            raise ModelError(
                f"{file} is of another model: it has ids up to {max(beyond)}, but vocab_size in "
                f"config.json is {size}"
            )

    def encode(
        self, text: str, add_special_tokens: bool = True, most: int | None = None
    ) -> list[int]:
        """Token ids of `text`; `add_special_tokens` lets the tokenizer add its own BOS or EOS.

        Raises ModelError for text that is no Unicode text (half a surrogate pair), and
        TooLongError for one of far more than `most` tokens, of which it reads no more than it must:
        tokenizing takes seconds per megabyte.
        """
        if most is not None:
            self._check_length(text, most + MARGIN)
        return self._encode(text, add_special_tokens)

    def _check_length(self, text: str, most: int) -> None:
        size = FIRST_LOOK * most
        while size < len(text):
            tokens = len(self._encode(text[:size], add_special_tokens=False))
            if tokens > most:
                raise TooLongError(
                    f"the first {size} of its {len(text)} characters are {tokens} tokens"
                )
            size *= 4

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Of the library's ways to encode, a batch alone lets other threads run meanwhile."""
        try:
            [encoding] = self._fast.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except TypeError:
            raise ModelError("the text is no valid Unicode: it cannot be tokenized") from None
        ids: list[int] = encoding.ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`."""
        text: str = self._fast.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(
        self, prompt: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> Detokenizer:
        """The text behind `prompt`, to be made token by token; its last `CONTEXT` tokens will
        do."""
        if not self._spelling.exact:
            decode = partial(self.decode, skip_special_tokens=skip_special_tokens)
            return DecodingDetokenizer(decode, prompt)
        spell = self._shown_bytes if skip_special_tokens else self.token_bytes
        begins = not any(map(spell, prompt[-CONTEXT:]))
        return SpellingDetokenizer(spell, drop_space=self._spelling.drops_space and begins)

    def token_bytes(self, id: int) -> bytes:
        """What one token stands for, in UTF-8, special ones spelled out: it may be a part of a
        character. Empty for ids that are no token."""
        spelled = self._pieces.get(id)
        if spelled is None:
            piece: str | None = self._fast.id_to_token(id)
            spelled = b"" if piece is None else self._spelling.spell(piece, id in self._added)
            self._pieces[id] = spelled
        return spelled

    def _shown_bytes(self, id: int) -> bytes:
        return b"" if id in self._skipped else self.token_bytes(id)


def _fast(file: Path, named: NamedTokens) -> FastTokenizer:
    """That of tokenizer.json, with the tokens that are `named` beside it. Raises ModelError."""
    if not has_file(file):
        raise ModelError(
            f"{file} is missing; write it with "
            "transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    text = read_text(file)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # batches are of one, on this core
    try:
        with foreign_code():
            fast = FastTokenizer.from_str(text)
            fast.no_truncation()
            fast.no_padding()
            named.add_to(fast)
    except ForeignError as error:
        raise ModelError(f"{file} cannot be read ({error}): download it again") from error
    return fast
