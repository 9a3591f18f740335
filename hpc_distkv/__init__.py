"""Offline batch generation with a KV cache that is spread over MPI ranks (arXiv 2401.02669)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpc_distkv.api import Engine
    from hpc_distkv.batch.results.files import Files
    from hpc_distkv.start.options import EngineOptions

__all__ = ["Engine", "EngineOptions", "Files"]


def __getattr__(name: str) -> Any:
    """The public names, loaded when they are first used: importing the package loads no torch."""
    if name in __all__:
        from hpc_distkv import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
