"""What messages between every two instances cost, measured once at start."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from hpc_distkv.comm.transport import Comm

log = logging.getLogger(__name__)

PROBE_LIMIT = 512
"""Most instances that are probed: the rounds grow with their number, the pairs with its square."""
BLOCK_CAP = 4 << 20
"""Most bytes of a block that are sent: more would take longer and tell little more."""
BLOCK_REPEATS = 2

Cost = tuple[int, float, float]
"""(other instance, seconds of a round trip, bytes per second)."""


class LinkCosts(NamedTuple):
    """Costs between instances, both `[instances][instances]` and symmetric."""

    round_trip: list[list[float]]
    """Seconds from posting a query until as many bytes have come back; 0 on the diagonal."""
    bandwidth: list[list[float]]
    """Bytes per second of a block, its latency included; infinite on the diagonal."""


def probe(comm: Comm, query_bytes: int, block_bytes: int, repeats: int = 5) -> LinkCosts | None:
    """Measure every two instances once, and open their connections on the way. Collective; no
    round may be open and no exchange under way. Raises StallError.

    Returns the costs on rank 0, None elsewhere; beyond PROBE_LIMIT instances None everywhere.

    The first ranks of all instances play a tournament by the circle method: with n instances n - 1
    rounds (n if n is odd), in each of which every instance meets at most one other. A meeting, with
    the same waits as the engine's, so that what they cost is in the figures:

        lower instance:  send, await it → receive, await it   `repeats` times with a query,
        upper instance:  receive, await it → send, await it   then twice with a block

    The best of the repeats counts: whatever else the nodes do meanwhile only adds to a time, and
    so does waiting for a peer that is still busy with its last round. The pairs of a round are
    measured at the same time, so ranks that share a network card share it here as in a step.

    Why it cannot deadlock: consider the earliest round that some rank never finishes. Both ranks
    of its meeting have finished all rounds before, so both reach it; each has one partner, and the
    two agree on who sends: the n-th wait of one is for the n-th post of the other, which comes
    before that one's own n-th wait. So the meeting ends. The gather at the end waits only for
    ranks to reach it; ranks of other lanes are there from the start.
    """
    assert min(query_bytes, block_bytes, repeats) > 0
    world = comm.world
    if world.instances > PROBE_LIMIT:
        if world.rank == 0:
            log.warning(
                "%d instances are too many to measure every two of them (limit %d): "
                "partners are chosen by node instead",
                world.instances,
                PROBE_LIMIT,
            )
        return None
    measured = meet_all(comm, query_bytes, block_bytes, repeats) if world.lane == 0 else []
    rows = gather(comm, measured) if world.instances > 1 else [[]]
    return matrices(rows[:: world.tp]) if world.rank == 0 else None


def opponent(instance: int, turn: int, instances: int) -> int | None:
    """Whom `instance` meets in round `turn`, None if nobody: the circle method.

    Over an odd number m of rounds, i meets j if i + j = turn (mod m). The one that would meet
    itself meets instance m, or sits out where there is no instance m.
    """
    rounds = turns(instances)
    if instance == rounds:
        return turn * (rounds + 1) // 2 % rounds  # the i of 2i = turn (mod m)
    other = (turn - instance) % rounds
    if other == instance:
        other = rounds
    return other if other < instances else None


def turns(instances: int) -> int:
    """Rounds of the tournament: the odd one of n - 1 and n."""
    return (instances - 1) | 1


def meet_all(comm: Comm, query_bytes: int, block_bytes: int, repeats: int) -> list[Cost]:
    """Play all rounds of this instance. Returns the costs of the meetings that it timed: those
    with higher instances."""
    me, instances = comm.world.instance, comm.world.instances
    place = comm.device.place
    query = torch.ones(query_bytes, dtype=torch.uint8, device=place)
    block = torch.ones(min(block_bytes, BLOCK_CAP), dtype=torch.uint8, device=place)
    costs = []
    for turn in range(turns(instances)):
        other = opponent(me, turn, instances)
        if other is None:
            continue
        round_trip = ping_pong(comm, other, query, repeats)
        block_trip = ping_pong(comm, other, block, BLOCK_REPEATS)
        if me < other:
            costs.append((other, round_trip, 2 * block.nbytes / block_trip))
    return costs


def ping_pong(comm: Comm, other: int, tensor: torch.Tensor, repeats: int) -> float:
    """Send `tensor` to and fro between two instances. Returns the fewest seconds that this took,
    which mean something on the lower instance only."""
    peer, what = [(comm.world.rank_of(other), tensor)], f"probe of instance {other}"
    exchange = comm.transport.exchange
    best = math.inf
    for _ in range(repeats):
        started = time.perf_counter()
        if comm.world.instance < other:
            exchange(peer, []).wait(what)
            exchange([], peer).wait(what)
        else:
            exchange([], peer).wait(what)
            exchange(peer, []).wait(what)
        best = min(best, time.perf_counter() - started)
    return best


def gather(comm: Comm, costs: Sequence[Cost]) -> list[list[Cost]]:
    """The costs of all ranks, by rank, on rank 0; [] elsewhere."""
    return [json.loads(row) for row in comm.gather(json.dumps(costs).encode())]


def matrices(rows: Sequence[Sequence[Cost]]) -> LinkCosts:
    """The costs by instance as symmetric matrices."""
    n = len(rows)
    costs = LinkCosts([[0.0] * n for _ in range(n)], [[math.inf] * n for _ in range(n)])
    for a, row in enumerate(rows):
        for b, round_trip, bandwidth in row:
            costs.round_trip[a][b] = costs.round_trip[b][a] = round_trip
            costs.bandwidth[a][b] = costs.bandwidth[b][a] = bandwidth
    return costs
