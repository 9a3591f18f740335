"""The sandbox that chat templates run in: they are foreign code, and may not even end."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from jinja2 import Environment, nodes, pass_environment
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.filters import make_attrgetter
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace
from markupsafe import Markup

from hpc_distkv.model.errors import ModelError, TooLongError
from hpc_distkv.model.template_sizes import (
    COMPARING,
    FILTERS,
    METHODS,
    both,
    check,
    check_operation,
    concatenated,
    joinable,
    spelled,
    written,
)

SECONDS = 10.0
"""Of the processor's time that a template may take for one prompt."""
_WIDTH = re.compile(r"\d{7}")
"""In a format: a field of millions of characters."""
_LEFT_OUT = ("translate", "to_bytes")


class EndlessTemplateError(ModelError):
    """A template that took too long."""


class _Namespace(Namespace):
    """As text it does not tell what it holds, which may be itself."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Formatter(SandboxedFormatter):
    """Counts the characters that it makes."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self._size = 0

    def convert_field(self, value: Any, conversion: Any) -> Any:
        """`{!r}`."""
        if conversion:
            check(spelled(value))
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> str:
        """`{:>8}`."""
        if _WIDTH.search(format_spec):
            raise TooLongError("the chat template makes a field of millions of characters")
        check(spelled(value))
        text: str = super().format_field(value, format_spec)
        self._size += len(text)
        check(self._size)
        return text


class Sandbox(ImmutableSandboxedEnvironment):
    """A sandbox whose templates end: within `limited` each turn of a loop and each call looks at
    the clock, and no text or list grows beyond `LONGEST`."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=written, **options)
        self._deadline = self._next_look = math.inf
        self.globals["namespace"] = _Namespace
        del self.globals["lipsum"]  # which makes as much text as it is asked for
        del self.filters["urlize"]  # which writes its arguments at each address

    def bound_filters(self) -> None:
        """Give filters that make much, and tests that compare, a limit; once all filters are
        there."""
        for name, size in FILTERS.items():
            self.filters[name] = _bounded(self.filters[name], size)
        tests: dict[str, Any] = self.tests
        for name in COMPARING:
            tests[name] = _bounded(tests[name], both)
        self.filters["join"] = _join

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Let templates take `SECONDS` from now on, and then raise EndlessTemplateError."""
        self._deadline = time.thread_time() + SECONDS
        self._next_look = time.monotonic() + SECONDS
        try:
            yield
        finally:
            self._deadline = self._next_look = math.inf

    def tick(self) -> bool:
        """True. Raises EndlessTemplateError if the time is over."""
        if time.monotonic() >= self._next_look:  # quick, and no thread's time overtakes it
            left = self._deadline - time.thread_time()
            if left <= 0:
                raise EndlessTemplateError(f"it did not come to an end in {SECONDS:g} s")
            self._next_look = time.monotonic() + left
        return True

    def concat(self, parts: Iterable[str]) -> str:
        """All `parts` as one text. Raises TooLongError."""
        return concatenated(parts)

    def joined(self, *parts: Any) -> str:
        """`a ~ b`. Raises TooLongError."""
        return concatenated(map(written, parts))

    def comparable(self, value: Any) -> Any:
        """`value`. Raises TooLongError."""
        check(spelled(value))
        return value

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Without bytes, and without what makes texts of tables."""
        if isinstance(obj, bytes) or attr in _LEFT_OUT:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The method `format` or `format_map` of a text, in the sandbox and with a limit."""
        if super().wrap_str_format(value) is None:
            return None
        text = value.__self__
        if isinstance(text, Markup):
            raise SecurityError("an escaped text has no format")

        def formatted(*args: Any, **kwargs: Any) -> str:
            if value.__name__ == "format_map":
                (kwargs,), args = args, ()
            return _Formatter(self).vformat(text, args, kwargs)

        return formatted

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Calls of all kinds, of macros too."""
        __self.tick()
        text = getattr(__obj, "__self__", None)
        if isinstance(text, str):
            name = __obj.__name__
            if name in METHODS:
                check(METHODS[name](text, *args, **kwargs))
            elif name == "join":
                args = (joinable(text, *args),)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operation whose result may be large."""
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            check(len(left) + len(right))
            return left + right
        check_operation(operator, left, right)
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

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:  # noqa: N802
        """Of two values that both may be nested: with a limit."""
        if not any(map(_is_plain, (node.expr, *(operand.expr for operand in node.ops)))):
            node.expr = _call("comparable", [node.expr], node.lineno)
            for operand in node.ops:
                operand.expr = _call("comparable", [operand.expr], node.lineno)
        super().visit_Compare(node, frame)

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


def _is_plain(node: nodes.Expr) -> bool:
    """Whether it is as it stands, so that a comparison with it is short."""
    parts = node.items if isinstance(node, nodes.List | nodes.Tuple) else [node]
    return all(isinstance(part, nodes.Const) for part in parts)


def _call(name: str, arguments: list[nodes.Expr], lineno: int) -> nodes.Call:
    """A call of the environment's method `name`."""
    method = nodes.EnvironmentAttribute(name, lineno=lineno)
    return nodes.Call(method, arguments, [], None, None, lineno=lineno)


def _bounded(function: Callable[..., Any], size: Callable[..., int]) -> Callable[..., Any]:
    """The filter `function`, of which `size` says beforehand how much it makes."""
    passed = hasattr(function, "jinja_pass_arg")

    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        check(size(*args[passed:], **kwargs))
        return function(*args, **kwargs)

    return bounded


@pass_environment
def _join(
    environment: Sandbox, value: Iterable[Any], d: Any = "", attribute: str | int | None = None
) -> str:
    """The filter `join`."""
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    separator = written(d)
    return separator.join(map(str, joinable(separator, value)))
