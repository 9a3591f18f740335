"""Text to token ids and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from hpc_distkv.model.errors import ModelError
from hpc_distkv.model.files import read_json


class Tokenizer:
    """The tokenizer of a model directory: tokenizer.json and tokenizer_config.json."""

    def __init__(self, path: str | Path) -> None:
        """Read the tokenizer of directory `path`. Raises ModelError if there is no usable one."""
        file = Path(path) / "tokenizer.json"
        if not file.is_file():
            raise ModelError(
                f"{file} is missing; write it with "
                "transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )
        try:
            self._fast = FastTokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise ModelError(f"{file} cannot be read ({error}): download it again") from error
        self._fast.no_truncation()
        self._fast.no_padding()
        settings_file = Path(path) / "tokenizer_config.json"
        self.settings = read_json(settings_file) if settings_file.is_file() else {}
        self.special_tokens = _special_tokens(self.settings)
        """Named special tokens, such as {"bos_token": "<s>"}."""
        self.vocab_size: int = self._fast.get_vocab_size(with_added_tokens=True)
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_id = self._id_of("eos_token")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; `add_special_tokens` lets the tokenizer add its own BOS or EOS.

        Raises ModelError for text that is no Unicode text (half a surrogate pair).
        """
        try:
            encoding = self._fast.encode(text, add_special_tokens=add_special_tokens)
        except TypeError:
            raise ModelError("the text is no valid Unicode: it cannot be tokenized") from None
        ids: list[int] = encoding.ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        text: str = self._fast.decode(list(ids), skip_special_tokens=True)
        return text

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        if token is None:
            return None
        number: int | None = self._fast.token_to_id(token)
        return number


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """The *_token entries, each a string or an object with "content"."""
    found = {}
    for key, value in settings.items():
        token = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(token, str):
            found[key] = token
    return found
