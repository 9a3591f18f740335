"""Where chat templates run: they are foreign code, which may also not come to an end."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from functools import wraps
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hpc_distkv.model.errors import ModelError, TooLongError

SECONDS = 10.0
"""Of the processor's time that a template may take for one prompt."""
LONGEST = 64 << 20
"""Characters of any text that it makes, and elements of any list."""
_MOST_BITS = 1 << 16
"""Of a whole number that it computes."""
_WIDTH = re.compile(r"\d{7}")
"""In a format: a field of millions of characters."""
_FORMATTING = ("format", "format_map")
_FILLING = ("ljust", "rjust", "center", "zfill", "expandtabs")
"""Methods of texts."""
_PADDING = ("center", "indent", "batch", "slice", "tojson")
"""Filters that fill up to a size."""


class EndlessTemplateError(ModelError):
    """A template that took too long."""


class Sandbox(ImmutableSandboxedEnvironment):
    """A sandbox whose templates end: within `limited` each turn of a loop and each call looks at
    the clock, and nothing grows beyond `LONGEST`."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._deadline = math.inf
        del self.globals["lipsum"]  # which makes as much text as it is asked for

    def bound_filters(self) -> None:
        """Give filters that fill up to a size a limit; once all filters are there."""
        for name in _PADDING:
            self.filters[name] = _bounded(self.filters[name], _check_sizes)
        self.filters["format"] = _bounded(
            self.filters["format"], lambda values: _check_operation("%", values[0], values[1:])
        )

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Let templates take `SECONDS` from now on, and then raise EndlessTemplateError."""
        self._deadline = time.thread_time() + SECONDS
        try:
            yield
        finally:
            self._deadline = math.inf

    def tick(self) -> bool:
        """True. Raises EndlessTemplateError if the time is over."""
        if time.thread_time() > self._deadline:
            raise EndlessTemplateError(f"it did not come to an end in {SECONDS:g} s")
        return True

    def concat(self, parts: Iterable[str]) -> str:
        """All `parts` as one text. Raises TooLongError."""
        kept, size = [], 0
        for part in parts:
            size += len(part)
            _check_size(size)
            kept.append(part)
        return "".join(kept)

    def joined(self, *parts: Any) -> str:
        """`a ~ b`. Raises TooLongError."""
        return self.concat(map(str, parts))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Calls of all kinds, of macros too."""
        __self.tick()
        method = getattr(__obj, "__wrapped__", __obj)  # as the sandbox wraps str.format
        if isinstance(text := getattr(method, "__self__", None), str):
            _check_method(method.__name__, text, (*args, *kwargs.values()))
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operation whose result may be large."""
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            _check_size(len(left) + len(right))
            return left + right
        _check_operation(operator, left, right)
        return super().call_binop(context, operator, left, right)


class _Ticking(CodeGenerator):
    """Compiles loops whose turns look at the clock, and `~` with a limit."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:  # noqa: N802
        """The condition of a loop makes turns too."""
        tick = _call("tick", [], node.lineno)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(tick, node.test, lineno=node.lineno)
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        """Through the environment."""
        self.visit(_call("joined", node.nodes, node.lineno), frame)

    def visit_Call(  # noqa: N802
        self, node: nodes.Call, frame: Frame, forward_caller: bool = False
    ) -> None:
        """Calls of the environment itself are those above, and need no sandbox."""
        if not isinstance(node.node, nodes.EnvironmentAttribute):
            super().visit_Call(node, frame, forward_caller=forward_caller)
            return
        self.visit(node.node, frame)
        self.write("(")
        for argument in node.args:
            self.visit(argument, frame)
            self.write(", ")
        self.write(")")


Sandbox.code_generator_class = _Ticking


def _call(name: str, arguments: list[nodes.Expr], lineno: int) -> nodes.Call:
    """A call of the environment's method `name`."""
    method = nodes.EnvironmentAttribute(name, lineno=lineno)
    return nodes.Call(method, arguments, [], None, None, lineno=lineno)


def _bounded(
    function: Callable[..., Any], check: Callable[[tuple[Any, ...]], None]
) -> Callable[..., Any]:
    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        check((*args, *kwargs.values()))
        return function(*args, **kwargs)

    return bounded


def _check_size(size: int) -> None:
    if size > LONGEST:
        raise TooLongError(f"the chat template makes more than {LONGEST} characters of it")


def _check_sizes(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int):
            _check_size(value)


def _check_format(text: str) -> None:
    if _WIDTH.search(text):
        raise TooLongError("the chat template makes a field of millions of characters")


def _check_method(name: str, text: str, values: Iterable[Any]) -> None:
    """A method of `text`."""
    if name in _FORMATTING:
        _check_format(text)
    elif name in _FILLING:
        _check_sizes(values)


def _check_operation(operator: str, left: Any, right: Any) -> None:
    if operator == "%":
        if isinstance(left, str):
            _check_format(left)
            _check_sizes(right if isinstance(right, tuple) else (right,))
    elif isinstance(left, int) and isinstance(right, int):
        left_bits, right_bits = left.bit_length(), right.bit_length()
        bits = {"+": 1, "*": left_bits + right_bits, "**": left_bits * max(right, 1)}[operator]
        if bits > _MOST_BITS:
            raise ModelError("the chat template computes a number of too many digits")
    elif operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
        _check_size(len(left) + len(right))
    else:
        for sized, times in ((left, right), (right, left)):
            if isinstance(sized, Sized) and isinstance(times, int):
                _check_size(len(sized) * times)
