"""Typed access to the keys of a config.json, and which layers they give a window. No torch here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from hpc_distkv.model.errors import ModelError
from hpc_distkv.model.family import Family

MOST_WHOLE = 2**31 - 1
LEAST_NUMBER, MOST_NUMBER = 1e-30, 1e30
"""No setting of a model is beyond, and what is computed from it stays a number."""


class Settings:
    """The keys of one configuration; whatever is wrong with a value is a ModelError that names the
    key and the file."""

    def __init__(
        self,
        raw: Mapping[str, Any],
        where: str,
        defaults: Mapping[str, Any] | None = None,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        """`where` names the file; `defaults`: what missing keys mean; `aliases`: our name of a key
        → the name that `raw` may have for it, which wins."""
        self.where, self._aliases = where, aliases or {}
        self._values = {**(defaults or {}), **raw}
        for ours, theirs in self._aliases.items():
            if theirs in raw:
                self._values[ours] = raw[theirs]

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is; `default` if it is missing or null."""
        value = self._values.get(key)
        return default if value is None else value

    def name(self, key: str) -> str:
        """What the file calls `key`."""
        theirs = self._aliases.get(key, key)
        return theirs if theirs in self._values else key

    def error(self, key: str, problem: str) -> ModelError:
        """The error that `key` has that problem."""
        return ModelError(f"{self.where}: {self.name(key)} {problem}")

    def require(self, key: str, allowed: tuple[Any, ...]) -> None:
        """Raise unless the value is one of `allowed`, or missing."""
        if key in self and self._values[key] not in allowed:
            listed = ", ".join(map(repr, allowed))
            raise self.error(key, f"= {self._values[key]!r} is not supported; supported: {listed}")

    def choice(self, key: str, among: Collection[str], default: str) -> str:
        """One of `among`."""
        value = self.get(key, default)
        if not isinstance(value, str) or value not in among:
            listed = ", ".join(among)
            raise self.error(key, f"= {value!r} is not supported; supported are {listed}")
        return value

    def whole(
        self, key: str, default: int | None = None, least: int = 1, most: int = MOST_WHOLE
    ) -> int:
        """A whole number from `least` to `most`."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            kind = "a positive whole number" if least == 1 else f"a whole number from {least}"
            raise self.error(key, f"must be {kind}, not {value!r}")
        if value > most:
            raise self.error(key, f"= {value} cannot be: it is at most {most}")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self.get(key, default)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not LEAST_NUMBER <= value <= MOST_NUMBER:
            raise self.error(key, f"must be a positive number, not {value!r}")
        return float(value)

    def optional(self, key: str) -> float | None:
        """A number above 0, or None if the key is missing or null."""
        return None if self.get(key) is None else self.positive(key)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {value!r}")
        return value

    def section(self, key: str) -> Mapping[str, Any]:
        """An object; empty if the key is missing or null."""
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            raise self.error(key, f"must be an object, not {value!r}")
        return value


FULL, SLIDING = "full_attention", "sliding_attention"
"""What config.json calls layers without a window and with one."""


def read_windows(read: Settings, family: Family, layers: int, max_position: int) -> tuple[int, ...]:
    """For each layer the tokens that a query sees, or 0: all; empty: all 0. A window as wide as
    `max_position` counts as none. Raises ModelError."""
    if family.windows == "none" or not read.flag("use_sliding_window", True):
        return ()
    sliding = _sliding_layers(read, family, layers)
    if read.get("sliding_window") is None:
        if read.get("layer_types") is not None and any(sliding):
            raise read.error("sliding_window", f"is missing, but layer_types has {SLIDING}")
        return ()
    window = read.whole("sliding_window")
    if window >= max_position or not any(sliding):
        return ()
    return tuple(window if slides else 0 for slides in sliding)


def _sliding_layers(read: Settings, family: Family, layers: int) -> list[bool]:
    types = read.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != layers:
            raise read.error("layer_types", f"must list {layers} layers")
        for kind in types:
            if kind not in (FULL, SLIDING):
                raise read.error("layer_types", f"has {kind!r}; supported are {FULL} and {SLIDING}")
        return [kind == SLIDING for kind in types]
    if family.windows == "pattern":
        every = read.whole("sliding_window_pattern")
        return [bool((index + 1) % every) for index in range(layers)]
    first = read.whole("max_window_layers", least=0) if family.windows == "upper" else 0
    return [index >= first for index in range(layers)]
