"""The gManager to the instances."""

from __future__ import annotations

import msgspec

from hpc_distkv.control.messages.requests import NOBODY, Request
from hpc_distkv.ids import InstanceId, RequestId


class Answer(msgspec.Struct, omit_defaults=True):
    """The gManager to one instance, in force from its next boundary. Mutable while it is made."""

    round: int
    assign: list[Request] = []
    give_back: int = 0
    """Requests to return that were not begun, the youngest first."""
    lend: dict[InstanceId, int] = {}
    """Debtor → rBlocks of the promise to set aside for it."""
    granted: int = 0
    """rBlocks of those wanted that were granted: credit that their creditors will open by mail."""
    shed: dict[InstanceId, int] = {}
    """Creditor → rBlocks of the longest requests to move there as credit is opened."""
    recall: dict[InstanceId, int] = {}
    """Creditor → rBlocks to bring home."""
    keep: int = 0
    """rBlocks to leave free for loans to come: admit nothing into them."""
    begin: list[RequestId] = []
    """Requests too large for the instance that may begin with what there is, and borrow."""
    admit_before: int = NOBODY
    """No request younger than this may be admitted; NOBODY: all may."""
    preempt: int = 0
    """rBlocks to free by preempting requests younger than `admit_before`."""
    preempt_at: int = -1
    """Where; -1: anywhere."""
    drain: bool = False
    """Begin nothing any more: the run ends before all requests are answered."""
    stop: bool = False
    """The run is over, whatever still runs."""
