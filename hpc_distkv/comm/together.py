"""What all ranks do beside a run: all of them can, or all of them hear who cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, TypeVar, cast

from hpc_distkv.comm.transport import Comm
from hpc_distkv.errors import ExplainedError, FaultError, UserError

T = TypeVar("T")


class SetupError(UserError):
    """The job cannot start, on at least one rank; all ranks raise it together."""


class RankError(FaultError):
    """Another rank has failed, and all ranks raise together: that one its own error."""


def together(comm: Comm, prepare: Callable[[], T], caught: type[BaseException] = UserError) -> T:
    """The result of `prepare`, unless a rank has an error: if that is a user's, all ranks raise
    SetupError. Other kinds only if they are `caught`, for which `prepare` must not be collective:
    then that rank raises its own, and the others RankError. Collective."""
    return _all_or_none(comm, prepare, caught, setup=True)


def concluded(comm: Comm, part: Callable[[], T]) -> T:
    """The result of `part`, which is not collective, unless a rank has an error: then that rank
    raises it, and the others RankError. Collective."""
    return _all_or_none(comm, part, BaseException, setup=False)


def _all_or_none(comm: Comm, part: Callable[[], T], caught: type[BaseException], setup: bool) -> T:
    result: T | None = None
    own: BaseException | None = None
    comm.all_raise(None)
    with comm.waiter.patient():
        try:
            result = part()
        except caught as error:  # one that was interrupted tells the others too
            own = error
        said = comm.share(None if own is None else (isinstance(own, UserError), _text(own)))
    for rank, told in enumerate(said):
        if told is not None:
            _raise(comm, own, rank, *told, setup)
    return cast(T, result)


def _raise(
    comm: Comm, own: BaseException | None, rank: int, users: bool, text: str, setup: bool
) -> NoReturn:
    """`text`: what the first rank has to say that cannot."""
    where = comm.world.name(rank)
    if own is None or (setup and isinstance(own, UserError)):
        told = f"{text} ({where})" if rank else text
        agreed = SetupError(told) if setup and users else RankError(f"{where} failed: {text}")
        comm.all_raise(agreed)
        raise agreed from own
    comm.all_raise(own)
    raise own


def _text(error: BaseException) -> str:
    """What an error says; an exception that says nothing has at least a name."""
    return str(error) if isinstance(error, ExplainedError) else f"{type(error).__name__}: {error}"
