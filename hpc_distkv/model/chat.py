"""The checkpoint's own chat template: messages to prompt tokens."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from hpc_distkv.model.errors import ModelError, TooLongError
from hpc_distkv.model.files import has_file, read_text
from hpc_distkv.model.special_tokens import CONFIG
from hpc_distkv.model.template_sandbox import EndlessTemplateError, Sandbox
from hpc_distkv.model.template_sizes import check, concatenated, spelled, written
from hpc_distkv.model.tokenizer import Tokenizer

LARGEST = 1 << 20
"""Characters of a template; those in use have some thousands."""


class ChatTemplate:
    """Renders messages as the checkpoint was trained on, in a sandbox: templates are foreign code.

    Filters, globals and whitespace rules are those templates are written for (transformers,
    `apply_chat_template`).
    """

    def __init__(self, path: str | Path, tokenizer: Tokenizer) -> None:
        """Read the template of directory `path`.

        A directory without one is fine until `chat` is called: /v1/completions rows need none.
        Raises ModelError if the template does not compile.
        """
        self._tokenizer = tokenizer
        self._where = str(path)
        source = find_template(Path(path), tokenizer.settings)
        self._environment = _environment()
        self._template = None if source is None else self._compiled(source)
        self._endless: str | None = None
        """Why the template cannot be used, whatever the messages."""

    def _compiled(self, source: str) -> Template:
        if len(source) > LARGEST:
            raise ModelError(
                f"the chat template of {self._where} has more than {LARGEST} characters"
            )
        try:
            return self._environment.from_string(source)
        except Exception as error:  # also Python's, of code that is nested too deeply for it
            raise ModelError(
                f"the chat template of {self._where} does not compile: {error}"
            ) from error

    def __call__(self, messages: Sequence[Mapping[str, Any]], most: int | None = None) -> list[int]:
        """Token ids of a prompt that asks for the assistant's next message.

        `messages`: [{"role": ..., "content": text}, ...]. Raises ModelError with the template's
        own words if it refuses them, does not come to an end, or if the model has no template;
        TooLongError for far more than `most` tokens.
        """
        # The template writes the BOS itself, so the tokenizer must not add another.
        return self._tokenizer.encode(self.render(messages), add_special_tokens=False, most=most)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt as text, special tokens spelled out."""
        if self._template is None:
            raise ModelError(
                f"{self._where} has no chat template: use /v1/completions with a plain prompt, "
                "or put a chat_template.jinja there"
            )
        if not messages:
            raise ModelError("messages is empty: a chat needs at least one message")
        if self._endless:
            raise ModelError(self._endless)
        try:
            return self._run(self._template, messages)
        except TooLongError:
            raise
        except EndlessTemplateError as error:
            said = f"the chat template cannot be used: {error}"
            self._endless = None if self._ends(self._template) else said
            raise ModelError(said) from None
        except Exception as error:  # a template is foreign code: it can fail in any way
            raise ModelError(f"the chat template refused the messages: {error}") from error

    def _run(self, template: Template, messages: Sequence[Mapping[str, Any]]) -> str:
        with self._environment.limited():
            return template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._tokenizer.special_tokens,
            )

    def _ends(self, template: Template) -> bool:
        """Whether `template` comes to an end with the shortest of chats: if it does not, no row
        needs to wait for it again."""
        try:
            self._run(template, [{"role": "user", "content": "Hello"}])
        except EndlessTemplateError:
            return False
        except Exception:
            return True
        return True


class _GenerationBlock(Extension):
    """{% generation %} marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> Sandbox:
    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = _tojson
    environment.bound_filters()
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter would escape HTML. Raises TooLongError."""
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    check(spelled(value))
    if indent is None and separators is None:
        return encoder.encode(value)
    check(sys.getrecursionlimit() * (indent if isinstance(indent, int) else len(indent or "")))
    return concatenated(encoder.iterencode(value))


def _raise_exception(message: Any) -> None:
    raise TemplateError(written(message))


def _strftime_now(form: str) -> str:
    check(256 * len(form))  # the most that Python makes of it
    return datetime.now().strftime(form)


def find_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The source of a model directory's chat template: chat_template.jinja, else the entry of
    tokenizer_config.json, a string or a named list. None if there is none. Raises ModelError."""
    file = folder / "chat_template.jinja"
    if has_file(file):
        return read_text(file)
    template, where = settings.get("chat_template"), folder / CONFIG
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, Mapping)]
        named = {str(entry.get("name")): entry.get("template") for entry in entries}
        template = named.get("default")
        if template is None:
            raise ModelError(
                f"{where} has the chat templates {sorted(named)}, "
                "but none named 'default': put the right one into chat_template.jinja"
            )
    if template is not None and not isinstance(template, str):
        raise ModelError(f"{where}: chat_template must be text")
    return template
