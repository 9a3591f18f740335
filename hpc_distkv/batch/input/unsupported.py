"""Request fields of OpenAI and vLLM that are known here and not supported (yet).

A field given at one of its neutral values asks for nothing, so it is accepted: clients often
spell out every default. Null is neutral for every field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from hpc_distkv.batch.errors import RowError

IGNORED = frozenset(
    {
        *("user", "metadata", "safety_identifier", "store", "service_tier"),
        *("prompt_cache_key", "prompt_cache_retention"),
    }
)
"""Fields for the bookkeeping of a service: they never change an answer."""

MESSAGE: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": (),
    "images": ([],),
    "partial": (False,),
    "prefix": (False,),
    "tool_call_id": (),
    "tool_calls": ([],),
}
"""Of a message of a chat."""

_COMMON: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "cache_salt": (),
    "detokenize": (True,),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "priority": (0,),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "parallel_tool_calls": (True, False),
    "stream": (False,),
    "stream_options": (),
    "structured_outputs": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}

CHAT: dict[str, tuple[Any, ...]] = _COMMON | {
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "audio": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}

COMPLETION: dict[str, tuple[Any, ...]] = _COMMON | {
    "add_special_tokens": (True,),
    "best_of": (1,),
    "prompt_embeds": (),
    "suffix": ("",),
}


def check(known: Mapping[str, tuple[Any, ...]], field: str, value: Any, path: str) -> None:
    """Refuse a `value` of the known `field`, which stands at `path`, that asks for something.
    Raises RowError."""
    if not _is_neutral(known[field], value):
        neutral = " or ".join(
            msgspec.json.encode(value).decode() for value in (*known[field], None)
        )
        raise refusal(f"'{path}' is not supported here, other than {neutral}.", path)


def refusal(message: str, path: str) -> RowError:
    """The error of what is known and not supported."""
    return RowError(message, code="unsupported_parameter", param=path)


def _is_neutral(neutrals: tuple[Any, ...], value: Any) -> bool:
    """Whether a value asks for nothing. 0 and 0.0 are one, 0 and false two."""
    return value is None or any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
        for neutral in neutrals
    )
