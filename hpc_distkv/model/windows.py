"""Which layers see a window of tokens only. No torch here."""

from __future__ import annotations

from hpc_distkv.model.family import Family
from hpc_distkv.model.settings import Settings

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
