"""What all ranks do before a run: all of them can, or all of them hear who cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from hpc_distkv.comm.transport import Comm
from hpc_distkv.errors import UserError

T = TypeVar("T")


class SetupError(UserError):
    """The job cannot start, on at least one rank; all ranks raise it together."""


def together(comm: Comm, prepare: Callable[[], T]) -> T:
    """The result of `prepare`, which is not collective, unless a rank has a user error: then all
    ranks raise SetupError. Collective."""
    result, error = None, None
    with comm.waiter.patient():
        try:
            result = prepare()
        except UserError as problem:
            error = str(problem)
        answers = comm.agree(error)
    for rank, said in enumerate(answers):
        if said is not None:
            where = f" ({comm.world.name(rank)})" if rank else ""
            raise SetupError(said + where)
    return cast(T, result)
