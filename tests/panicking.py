"""A tokenizer whose library panics at a text, as that of Llama 3 does at 11 million spaces."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

PANICS = "a" * 60
"""The text: the pattern tries more than the library allows, at which that calls `unwrap`."""


def save_panicking(folder: Path) -> None:
    """Write tokenizer.json. It has one token, the letter a."""
    fast = Tokenizer(models.BPE({"a": 0}, []))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(r"(?:a|a)+\d"), "isolated")
    fast.save(str(folder / "tokenizer.json"))
