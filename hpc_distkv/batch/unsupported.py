"""Request fields of OpenAI and vLLM that are known here and not supported (yet).

A field given at one of its neutral values asks for nothing, so it is accepted: clients often
spell out every default. Null is neutral for every field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

IGNORED = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})
"""Fields that are labels only: they never change an answer."""

PARTS = frozenset(
    {"image_url", "image", "input_audio", "audio_url", "video_url", "file", "refusal"}
)
"""Kinds of pieces of a message other than text, and the fields that hold them."""

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
    "service_tier": ("auto", "default"),
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
    "store": (False,),
    "verbosity": (),
    "web_search_options": (),
}

COMPLETION: dict[str, tuple[Any, ...]] = _COMMON | {
    "add_special_tokens": (True,),
    "best_of": (1,),
    "prompt_embeds": (),
    "suffix": ("",),
}


def is_neutral(known: Mapping[str, tuple[Any, ...]], field: str, value: Any) -> bool:
    """Whether `value` of the known `field` asks for nothing. 0 and 0.0 are one, 0 and false two."""
    return value is None or any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
        for neutral in known[field]
    )
