"""What every Comm keeps to, whatever carries it. Each function is run by all ranks.

As a script (under mpirun) runs all of them over MPI.
"""

from __future__ import annotations

import random
import sys
import time

import pytest
import torch
from letters import take

from hpc_distkv.comm.transport import TO_CREDITOR, TO_DEBTOR, Comm, Pairs

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8)


def payload(seed: tuple[int, ...], nbytes: int, dtype: torch.dtype) -> torch.Tensor:
    """Bytes that both sides can make from the same seed, as elements of `dtype`."""
    itemsize = torch.empty(0, dtype=dtype).element_size()
    count = max(1, nbytes // itemsize) * itemsize
    generator = torch.Generator().manual_seed(hash(seed) % 2**31)
    data = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    return data.view(dtype)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def hop(world_size: int, step: int) -> list[tuple[int, int, int, torch.dtype]]:
    """(source, target, bytes, dtype) of one hop: the same list on every rank."""
    rng = random.Random(step)
    return [
        (
            rng.randrange(world_size),
            rng.randrange(world_size),
            int(2 ** rng.uniform(0, 22 if step % 4 == 0 else 13)),
            rng.choice(DTYPES),
        )
        for _ in range(rng.randrange(8))
    ]


def exchanges_arrive_in_order(comm: Comm, steps: int = 40) -> None:
    """Random pairs, sizes and types; both overlap with the hop before."""
    me = comm.world.rank
    pause = random.Random(1000 + me)
    before = None
    for step in range(steps):
        sends: list[tuple[int, torch.Tensor]] = []
        recvs: list[tuple[int, torch.Tensor]] = []
        expected = []
        for i, (source, target, nbytes, dtype) in enumerate(hop(comm.world.size, step)):
            tensor = payload((step, i), nbytes, dtype)
            if source == me:
                sends.append((target, tensor.clone()))
            if target == me:
                recvs.append((source, torch.empty_like(tensor)))
                expected.append(tensor)
        if pause.random() < 0.2:
            time.sleep(0.002)
        pending = comm.transport.exchange(sends, recvs)
        if before is not None:
            check(*before)
        comm.transport.drained()
        before = pending, sends, recvs, expected
    assert before is not None
    check(*before)


def channels_do_not_mix(comm: Comm, steps: int = 30) -> None:
    """Everybody is debtor and creditor of the next one at once, and posts both in any order."""
    me, size = comm.world.rank, comm.world.size
    peers = [peer for peer in range(size) if peer != me]
    order = random.Random(me)
    pendings = []
    for step in range(steps):
        hops = []
        for send_on, receive_on in ((TO_CREDITOR, TO_DEBTOR), (TO_DEBTOR, TO_CREDITOR)):
            sends = [(p, torch.full((8,), 1000.0 * step + 10 * me + send_on)) for p in peers]
            recvs = [(p, torch.empty(8)) for p in peers]
            hops.append((sends, recvs, send_on, receive_on))
        order.shuffle(hops)
        pendings += [(step, hop, comm.transport.exchange(*hop)) for hop in hops]
    for step, (_, recvs, _, receive_on), pending in pendings:
        pending.wait("a hop on two channels")
        for peer, tensor in recvs:
            assert tensor.tolist() == [1000.0 * step + 10 * peer + receive_on] * 8


def check(pending, sends: Pairs, recvs: Pairs, expected: list[torch.Tensor]) -> None:
    pending.wait("a random hop")
    assert pending.done()
    for (_, got), wanted in zip(recvs, expected, strict=True):
        assert same_bytes(got, wanted)
    for _, tensor in sends:
        tensor.view(torch.uint8).fill_(0)  # free to overwrite now


def receives_may_come_first_or_last(comm: Comm) -> None:
    """A receive posted long before its send, and a send long before its receive."""
    if comm.world.size < 2 or comm.world.rank > 1:
        return
    other = 1 - comm.world.rank
    for size in (1, 100, 1 << 20):
        for first in (0, 1):
            out, into = torch.full((size,), 7.0), torch.zeros(size)
            if comm.world.rank == first:
                receiving = comm.transport.exchange([], [(other, into)])
                comm.mail.post(other, b"go")
                take(comm, [other], "the turn")
                comm.transport.exchange([(other, out)], []).wait("a late send")
                receiving.wait("an early receive")
            else:
                sending = comm.transport.exchange([(other, out)], [])
                comm.mail.post(other, b"go")
                take(comm, [other], "the turn")
                comm.transport.exchange([], [(other, into)]).wait("a late receive")
                sending.wait("an early send")
            assert torch.equal(into, out)


def mail_keeps_its_order(comm: Comm, steps: int = 60) -> None:
    """Everybody posts ahead by different amounts; every take gets the next one of each peer."""
    rng = random.Random(comm.world.rank)
    peers = list(range(comm.world.size))
    posted = 0
    for step in range(steps):
        while posted < steps and (posted <= step or rng.random() < 0.5):
            for peer in peers:
                comm.mail.post(peer, letter(comm.world.rank, peer, posted))
            posted += 1
        rng.shuffle(peers)
        for part in (peers[: len(peers) // 2], peers[len(peers) // 2 :]):
            got = take(comm, part, f"headers of step {step}")
            assert got == {peer: letter(peer, comm.world.rank, step) for peer in part}


def letter(source: int, target: int, number: int) -> bytes:
    return f"{source}>{target} #{number}".encode() * (4000 if number % 20 == 5 else 1)


def rounds_answer_every_report(comm: Comm, rounds: int = 60) -> None:
    """Ranks reach their boundaries at different times, rank 0 polls between its own work."""
    me, size = comm.world.rank, comm.world.size
    rng = random.Random(me)
    for k in range(rounds):
        comm.rounds.report(note("report", me, k))

        def ready(k: int = k) -> bytes | None:
            reports = comm.rounds.reports() if me == 0 else None
            if reports is not None:
                assert reports == [note("report", r, k) for r in range(size)]
                if rng.random() < 0.3:
                    time.sleep(0.001)
                comm.rounds.reply([note("answer", r, k) for r in range(size)])
                assert comm.rounds.reports() is None
            return comm.rounds.answer()

        for _ in range(rng.randrange(4)):  # a step of compute
            comm.transport.drained()
            if rng.random() < 0.2:
                time.sleep(0.002)
        assert comm.idle(ready, f"round {k}") == note("answer", me, k)
        assert comm.rounds.answer() is None


def note(kind: str, rank: int, k: int) -> bytes:
    size = (0, 1, 30, 20_000)[(rank * 7 + k * 3) % 4]
    return f"{kind} {rank} {k}".encode()[:size].ljust(size, b".")


def all_kinds_at_once(comm: Comm, steps: int = 12) -> None:
    """A control round in the background of steps that post mail and tensors, in a ring."""
    me, size = comm.world.rank, comm.world.size
    after, before = (me + 1) % size, (me - 1) % size
    for step in range(steps):
        comm.rounds.report(b"%d" % step)
        comm.mail.post(after, b"header %d" % step)
        assert take(comm, [before], "a header") == {before: b"header %d" % step}
        for layer in range(3):
            out = torch.full((50_000,), step * 10.0 + layer)
            into = torch.zeros_like(out)
            comm.transport.exchange([(after, out)], [(before, into)]).wait("queries")
            assert torch.equal(into, out)

        def ready(step: int = step) -> bytes | None:
            if me == 0 and (reports := comm.rounds.reports()) is not None:
                assert reports == [b"%d" % step] * size
                comm.rounds.reply(reports)
            return comm.rounds.answer()

        assert comm.idle(ready, "the answer") == b"%d" % step


def agreement_reaches_all(comm: Comm) -> None:
    last = comm.world.size - 1
    said = comm.agree("no such model: “x”" if comm.world.rank == last else None)
    assert said == [None] * last + ["no such model: “x”"]
    assert comm.agree(None) == [None] * (last + 1)


def a_round_has_one_report(comm: Comm) -> None:
    comm.rounds.report(b"")
    with pytest.raises(AssertionError, match="before the last round's answer"):
        comm.rounds.report(b"")

    def ready() -> bytes | None:
        if comm.world.rank == 0 and comm.rounds.reports() is not None:
            comm.rounds.reply([b"done"] * comm.world.size)
        return comm.rounds.answer()

    assert comm.idle(ready, "the answer") == b"done"


def closing_leaves_nothing(comm: Comm) -> None:
    comm.mail.post(comm.world.rank, b"to myself")
    assert take(comm, [comm.world.rank], "mail") == {comm.world.rank: b"to myself"}
    comm.close()
    comm.close()
    assert comm.closed
    assert comm.transport.drained()


CONTRACT = (
    exchanges_arrive_in_order,
    receives_may_come_first_or_last,
    channels_do_not_mix,
    mail_keeps_its_order,
    rounds_answer_every_report,
    all_kinds_at_once,
    agreement_reaches_all,
    a_round_has_one_report,
    closing_leaves_nothing,
)


def main() -> None:
    from hpc_distkv.comm.abort import aborting
    from hpc_distkv.comm.mpi.start import open_mpi

    with aborting(open_mpi(stall_timeout=20.0)) as comm:
        assert comm.world.local_size == comm.world.size == int(sys.argv[1])
        for promise in CONTRACT:
            promise(comm)
            if comm.world.rank == 0:
                print(f"kept: {promise.__name__}", flush=True)


if __name__ == "__main__":
    main()
