"""Tokens that a model directory names beside its tokenizer.json."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from hpc_distkv.model.errors import ModelError
from hpc_distkv.model.files import read_optional_json

CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""In the order in which those that are new get their ids."""
_EXTRA = ("extra_special_tokens", "additional_special_tokens")
"""Keys of tokens without a name; the second is the older one."""
TOKEN_FIELDS = ("content", "special", "normalized", "lstrip", "rstrip", "single_word")
"""All that an AddedToken has."""
_SPECIAL = {"special": True, "normalized": False}
"""Flags of a special token of which nothing but the text is known."""


@dataclass(frozen=True)
class NamedTokens:
    """What tokenizer_config.json says of tokens. Where it has no `added_tokens_decoder`, also what
    special_tokens_map.json says, which goes first, and added_tokens.json.

    Source: transformers, `AutoTokenizer.from_pretrained`.
    """

    names: dict[str, str]
    """Such as {"bos_token": "<s>"}."""
    special: list[AddedToken]
    """Those that have a name, and extra ones."""
    numbered: dict[int, AddedToken]
    """Token id → token."""
    source: Path
    """The file that has the numbers."""

    @classmethod
    def read(cls, folder: Path, settings: Mapping[str, Any]) -> NamedTokens:
        """Those of a model directory whose tokenizer_config.json has these `settings`. Raises
        ModelError."""
        config, decoder = folder / CONFIG, settings.get("added_tokens_decoder")
        names, special = _special(settings, config)
        if decoder is not None:
            return cls(names, list(special.values()), _decoder(decoder, config), config)
        file = folder / SPECIAL_TOKENS_MAP
        first_names, first = _special(read_optional_json(file), file)
        names, special = names | first_names, first | special
        file = folder / ADDED_TOKENS
        added = _added(read_optional_json(file), special, file)
        return cls(names, list(special.values()), added, file)

    def add_to(self, fast: FastTokenizer) -> None:
        """Add to `fast` what it lacks. Raises ModelError for a token that gets another id there
        than its file says, by which the model knows it."""
        known = {token.content: token for token in fast.get_added_tokens_decoder().values()}
        lacking = {
            id: token
            for id, token in sorted(self.numbered.items())
            if repr(token) != repr(known.get(token.content))
        }
        fast.add_tokens(list(lacking.values()))
        for id, token in lacking.items():
            is_now = fast.token_to_id(token.content)
            if token.content not in known and is_now != id:
                raise ModelError(
                    f"{self.source}: token {token.content!r} has id {id}, but beside "
                    f"tokenizer.json it gets {is_now}: the two are not of one model, or tokens "
                    "between them are missing; write them anew with "
                    "transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
                )
        special = {t.content for t in fast.get_added_tokens_decoder().values() if t.special}
        fast.add_special_tokens([t for t in self.special if t.content not in special])


def _special(
    settings: Mapping[str, Any], where: Path
) -> tuple[dict[str, str], dict[str, AddedToken]]:
    """Names → tokens' texts; and texts → tokens, extra ones among them."""
    named = {key: value for key, value in settings.items() if key.endswith("_token")}
    extra: Iterable[Any] = ()
    for key in _EXTRA:
        value = settings.get(key)
        if isinstance(value, Mapping):
            named |= value
        elif isinstance(value, list):
            extra = value
            break
    tokens = {name: _token(value, where) for name, value in named.items() if _is_token(value)}
    names = {name: token.content for name, token in tokens.items()}
    others = [_token(value, where) for value in extra if _is_token(value)]
    in_order = {name: tokens[name] for name in (*_NAMES, *tokens) if name in tokens}
    return names, {token.content: token for token in (*in_order.values(), *others)}


def _is_token(value: Any) -> bool:
    content = value.get("content") if isinstance(value, Mapping) else value
    return isinstance(content, str) and content != ""


def _decoder(raw: Any, where: Path) -> dict[int, AddedToken]:
    if not isinstance(raw, Mapping) or not all(map(_is_token, raw.values())):
        raise ModelError(f"{where}: added_tokens_decoder must hold a token for each id")
    return {_id(id, where): _token(value, where, {}) for id, value in raw.items()}


def _added(raw: Mapping[str, Any], special: Collection[str], where: Path) -> dict[int, AddedToken]:
    """Of text → id."""
    return {
        _id(id, where): _token(text, where, _SPECIAL if text in special else {})
        for text, id in raw.items()
    }


def _id(value: Any, where: Path) -> int:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise ModelError(f"{where}: {value!r} is no token id") from None


def _token(value: Any, where: Path, flags: Mapping[str, bool] = _SPECIAL) -> AddedToken:
    """A token that is written as its text, or as an object with its own flags."""
    given = {"content": value, **flags}
    if isinstance(value, Mapping):
        given = {name: value[name] for name in TOKEN_FIELDS if name in value}
        given["special"] = given.get("special", False) or flags.get("special", False)
    try:
        return AddedToken(**given)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{where}: {value!r} is no token ({error})") from None
