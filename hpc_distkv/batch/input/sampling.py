"""The sampling fields of one row → how the engine draws its tokens, checked against the model."""

from __future__ import annotations

from typing import Any

from hpc_distkv.batch.errors import RowError
from hpc_distkv.batch.input.body import ChatBody, CompletionBody, GenerationFields
from hpc_distkv.batch.input.service import Service
from hpc_distkv.control.messages.requests import LogitRules, Sampling

GREEDY_BELOW = 1e-5
"""A temperature below this is taken as 0: dividing logits by it would overflow."""


def read_sampling(
    body: ChatBody | CompletionBody, prompt_len: int, seed: int, service: Service
) -> Sampling:
    """What a body asks for, and defaults for what it leaves out; `seed` is the row's. Raises
    RowError."""
    defaults = service.defaults
    max_tokens = _max_tokens(prompt_len, asked_tokens(body), service)
    min_tokens = _min_tokens(body, max_tokens)
    stop_ids = _stop_ids(body, service)
    withheld = tuple(dict.fromkeys((*service.eos_ids, *stop_ids))) if min_tokens else ()
    return Sampling(
        max_tokens=max_tokens,
        temperature=_temperature(_or(body.temperature, defaults.temperature)),
        top_p=_or(body.top_p, defaults.top_p),
        top_k=_top_k(_or(body.top_k, defaults.top_k), service.vocab_size),
        seed=seed,
        stop_token_ids=stop_ids,
        min_tokens=min_tokens,
        stop=_stop(body),
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=_or(body.skip_special_tokens, True),
        logprobs=_logprobs(body, service),
        rules=_rules(body, withheld, service),
    )


def asked_tokens(body: ChatBody | CompletionBody) -> int | None:
    """The most output tokens that a body asks for. Raises RowError."""
    if not isinstance(body, ChatBody):
        return body.max_tokens
    new, old = body.max_completion_tokens, body.max_tokens
    if new is not None and old is not None and new != old:
        raise RowError(
            f"'max_tokens' is {old} and 'max_completion_tokens' is {new}; give one of them.",
            param="max_completion_tokens",
        )
    return old if new is None else new


def check_vocabulary(field: str, ids: list[int], service: Service) -> None:
    """Refuse ids that are no token of the model. Raises RowError."""
    size = service.vocab_size
    for wrong in (min(ids), max(ids)):
        if not 0 <= wrong < size:
            raise RowError(
                f"'{field}' has the token id {wrong}; the vocabulary has the ids 0 to {size - 1}.",
                param=field,
            )


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _max_tokens(prompt_len: int, asked: int | None, service: Service) -> int:
    limits = service.limits
    left = limits.tokens - prompt_len
    if left < (asked or 1):
        wanted = f"{asked} for the output" if asked else "at least 1 for the output"
        raise RowError(
            f"The row asks for {prompt_len + (asked or 1)} tokens ({prompt_len} in the prompt, "
            f"{wanted}), but {limits}. Shorten the prompt or lower max_tokens.",
            param="max_tokens" if left > 0 else "prompt",
            code="context_length_exceeded",
        )
    if asked is not None:
        return asked
    default = service.defaults.max_tokens
    return left if default is None else min(left, default)


def _min_tokens(body: GenerationFields, max_tokens: int) -> int:
    least = body.min_tokens or 0
    if least > max_tokens:
        raise RowError(
            f"'min_tokens' is {least}, but the output has at most {max_tokens} tokens.",
            param="min_tokens",
        )
    return least


def _temperature(given: float) -> float:
    return given if given >= GREEDY_BELOW else 0.0


def _top_k(given: int, vocab_size: int) -> int:
    return given if 0 < given < vocab_size else 0


def _stop(body: GenerationFields) -> tuple[str, ...]:
    given = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return tuple(dict.fromkeys(text for text in given if text))


def _stop_ids(body: GenerationFields, service: Service) -> tuple[int, ...]:
    asked = body.stop_token_ids or []
    if asked:
        check_vocabulary("stop_token_ids", asked, service)
    eos = () if body.ignore_eos else service.eos_ids
    return tuple(dict.fromkeys((*eos, *asked)))


def _logprobs(body: ChatBody | CompletionBody, service: Service) -> int | None:
    """Alternatives beside each token; None: no logprobs. A chat spells it with two fields."""
    if isinstance(body, ChatBody):
        if body.top_logprobs and not body.logprobs:
            raise RowError("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
        asked = (body.top_logprobs or 0) if body.logprobs else None
    elif body.logprobs is True:
        raise RowError(
            "'logprobs' of a completion is the number of alternatives to each token, not true.",
            param="logprobs",
        )
    else:
        asked = None if body.logprobs is False else body.logprobs
        if asked is not None and body.echo:
            raise RowError(
                "'logprobs' of the prompt are not supported: give either 'echo' or 'logprobs'.",
                param="logprobs",
                code="unsupported_parameter",
            )
    return None if asked is None else min(asked, service.vocab_size)


def _rules(
    body: GenerationFields, withheld: tuple[int, ...], service: Service
) -> LogitRules | None:
    rules = LogitRules(
        repetition_penalty=_or(body.repetition_penalty, service.defaults.repetition_penalty),
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        logit_bias=_logit_bias(body, service),
        withheld=withheld,
        min_p=_or(body.min_p, service.defaults.min_p),
    )
    return None if rules == LogitRules() else rules


def _logit_bias(body: GenerationFields, service: Service) -> tuple[tuple[int, float], ...]:
    bias: dict[int, float] = {}
    for key, value in (body.logit_bias or {}).items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise RowError(
                f"'logit_bias' has the key '{key}'; its keys are token ids.", param="logit_bias"
            )
        bias[int(key)] = value
    if bias:
        check_vocabulary("logit_bias", list(bias), service)
    return tuple(sorted((token, value) for token, value in bias.items() if value))
