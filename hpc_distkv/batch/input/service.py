"""What the rows of a job are checked against: the model's names, words and limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

import msgspec
from msgspec import Meta

from hpc_distkv.batch.input.body import SEEDS
from hpc_distkv.model.chat import ChatTemplate
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.detokenizer import Detokenizer
from hpc_distkv.model.tokenizer import Tokenizer


class TokenizerLike(Protocol):
    """What rows and answers need of a tokenizer."""

    def encode(
        self, text: str, add_special_tokens: bool = True, most: int | None = None
    ) -> list[int]:
        """Text → token ids. May raise TooLongError for far more than `most`."""

    def detokenizer(
        self, prompt: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> Detokenizer:
        """The text behind `prompt`, to be made token by token."""

    def token_bytes(self, id: int) -> bytes:
        """What one token stands for, in UTF-8; maybe a part of a character."""


@dataclass(frozen=True)
class Limits:
    """How long a request, prompt and output together, may become. In tokens."""

    max_model_len: int
    capacity_tokens: int | None = None
    """KV cache of the whole cluster; None: not known."""
    model_tokens: int | None = None
    """What the model is made for, of which `max_model_len` may be less; None: not known."""

    @property
    def tokens(self) -> int:
        """By both limits; the last token of an output needs no KV."""
        if self.capacity_tokens is None:
            return self.max_model_len
        return min(self.max_model_len, self.capacity_tokens + 1)

    def __str__(self) -> str:
        text = f"the model takes at most {self.max_model_len} tokens (--max-model-len)"
        if self.model_tokens is not None and self.model_tokens > self.max_model_len:
            text = f"--max-model-len is {self.max_model_len} (the model takes {self.model_tokens})"
        if self.capacity_tokens is not None:
            text += f" and the cluster's KV cache holds {self.capacity_tokens}"
        return text


class SamplingDefaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a row gets for the fields that it leaves out."""

    temperature: Annotated[float, Meta(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=-1)] = 0
    """0: no limit."""
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    """None: whatever the limits leave."""
    seed: Annotated[int, Meta(ge=SEEDS[0], le=SEEDS[1])] = 0
    """The job's seed; a row without one gets its own from this and its custom_id."""


@dataclass(frozen=True)
class Service:
    """What checks a row and turns it into tokens, and the answer back into text."""

    tokenizer: TokenizerLike
    chat: Callable[..., list[int]]
    """Messages, as role and content, and `most` as in `encode` → the tokens of the prompt. May
    raise anything."""
    vocab_size: int
    """Token ids are below this."""
    model_names: tuple[str, ...]
    """Names a row may give for the model; the first one is reported back."""
    limits: Limits
    defaults: SamplingDefaults
    eos_ids: tuple[int, ...] = ()

    @classmethod
    def from_dir(
        cls,
        path: str | Path,
        config: ModelConfig,
        limits: Limits,
        defaults: SamplingDefaults,
        tokenizer: Tokenizer | None = None,
    ) -> Service:
        """Tokenizer, read unless it is given, and chat template of a model directory. Raises
        ModelError."""
        tokenizer = tokenizer or Tokenizer(path, config.vocab_size)
        return cls(
            tokenizer=tokenizer,
            chat=ChatTemplate(path, tokenizer),
            vocab_size=config.vocab_size,
            model_names=model_names(path),
            limits=limits,
            defaults=defaults,
            eos_ids=end_ids(config, tokenizer),
        )


def end_ids(config: ModelConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that end an answer, by any file of the model, as in vLLM: of a model that was tuned to
    chat often the tokenizer's alone is up to date."""
    named = (*config.eos_token_ids, tokenizer.eos_token_id)
    return tuple(dict.fromkeys(id for id in named if id is not None and id < config.vocab_size))


def model_names(path: str | Path) -> tuple[str, ...]:
    """Names a row may give for the model in a directory; the directory's own name comes first."""
    full = Path(path).resolve()
    return tuple(dict.fromkeys((full.name, str(path), str(full))))
