"""What generation_config.json says of sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpc_distkv.model.errors import ModelError


@dataclass(frozen=True)
class GenerationDefaults:
    """Sampling settings of generation_config.json; greedy if it does not ask for sampling."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def read(cls, generation: Mapping[str, Any]) -> GenerationDefaults:
        """From the file's keys: greedy unless do_sample is true, as transformers reads them. Raises
        ModelError."""

        def setting(key: str, default: float, lowest: float, highest: float) -> float:
            value = generation.get(key)
            value = default if value is None else value
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not lowest <= value <= highest:
                raise ModelError(
                    f"generation_config.json: {key} must be a number from {lowest:g} to "
                    f"{highest:g}, not {value!r}"
                )
            return float(value)

        sampled = cls(
            temperature=setting("temperature", 1.0, 0, 100),
            top_p=setting("top_p", 1.0, 1e-6, 1),
            top_k=max(0, int(setting("top_k", 50, -1, 1e9))),
            min_p=setting("min_p", 0.0, 0, 1),
            repetition_penalty=setting("repetition_penalty", 1.0, 1e-6, 1e6),
        )
        if generation.get("do_sample"):
            return sampled
        return cls(repetition_penalty=sampled.repetition_penalty)
