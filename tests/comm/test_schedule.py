from __future__ import annotations

import time

import pytest
import torch
from letters import take
from local_ranks import leftovers, open_local, run_local
from seeded_schedule import SeededSchedule

from hpc_distkv.comm.waiter import StallError

SEEDS = range(30)


def seeded(ranks: int, seed: int):
    return open_local(ranks, schedule=SeededSchedule(seed))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_circle_of_waits_is_found_at_once(seed):
    def work(comm):
        before, after = (comm.world.rank - 1) % 3, (comm.world.rank + 1) % 3
        take(comm, [before], "a header")
        comm.mail.post(after, b"too late")

    began = time.monotonic()
    with pytest.raises(StallError) as stall:
        run_local(seeded(3, seed), work)
    assert str(stall.value) == (
        "deadlock: rank 0 waits for rank 2: a header; rank 1 waits for rank 0: a header; "
        "rank 2 waits for rank 1: a header"
    )
    assert time.monotonic() - began < 5


def test_waiting_for_a_rank_that_has_finished_is_a_deadlock():
    def work(comm):
        if comm.world.rank == 0:
            comm.transport.exchange([], [(1, torch.zeros(1))]).wait("queries")

    with pytest.raises(StallError, match="deadlock: rank 0 waits for rank 1: queries"):
        run_local(seeded(2, 0), work)


def failures(work) -> int:
    """How many seeds make `work` fail."""
    found = 0
    for seed in SEEDS:
        try:
            run_local(seeded(2, seed), work)
        except (AssertionError, StallError):
            found += 1
    return found


def test_a_wait_for_a_send_before_the_receive_is_posted_is_caught():
    """MPI may complete a small send at once and hold back a large one: seeds do both."""

    def work(comm):
        other = 1 - comm.world.rank
        comm.transport.exchange([(other, torch.ones(2))], []).wait("a send")
        comm.transport.exchange([], [(other, torch.ones(2))]).wait("a receive")

    assert 0 < failures(work) < len(SEEDS)


def test_a_buffer_changed_before_its_send_is_done_is_caught():
    def work(comm):
        tensor = torch.ones(2)
        if comm.world.rank == 0:
            sending = comm.transport.exchange([(1, tensor)], [])
            tensor.fill_(2)
            sending.wait("a send")
        else:
            comm.transport.exchange([], [(0, tensor)]).wait("a receive")
            assert tensor.tolist() == [1, 1]

    assert failures(work) > 0


def test_a_buffer_read_before_its_receive_is_done_is_caught():
    def work(comm):
        tensor = torch.full((2,), float(comm.world.rank))
        if comm.world.rank == 0:
            comm.transport.exchange([(1, tensor)], []).wait("a send")
        else:
            receiving = comm.transport.exchange([], [(0, tensor)])
            assert tensor.tolist() in ([0, 0], [1, 1])
            receiving.wait("a receive")

    assert failures(work) > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_messages_of_the_wrong_size_are_caught(seed):
    def work(comm):
        tensor = torch.ones(2 + comm.world.rank)
        pairs = [(1 - comm.world.rank, tensor)]
        if comm.world.rank == 0:
            comm.transport.exchange(pairs, []).wait("a send")
        else:
            comm.transport.exchange([], pairs).wait("a receive")

    with pytest.raises(AssertionError, match="rank 0 sent 8 bytes to rank 1 where 12 were"):
        run_local(seeded(2, seed), work)


def test_a_seed_is_one_interleaving():
    def trace(seed):
        log = []

        def work(comm):
            for step in range(5):
                comm.transport.drained()
                log.append((comm.world.rank, step))

        run_local(seeded(3, seed), work)
        return tuple(log)

    assert trace(1) == trace(1)
    assert len({trace(seed) for seed in SEEDS}) > 20


def test_an_event_between_two_polls_is_not_missed():
    """A wait on two things, of which one comes while it looks at the other."""

    def work(comm):
        rank = comm.world.rank
        if rank == 0:
            comm.rounds.report(b"")

            def ready():
                reports = comm.rounds.reports()
                comm.transport.drained()  # others go on here
                if reports:
                    comm.rounds.reply(reports)
                return comm.rounds.answer()

            comm.idle(ready, "answer")
        else:
            comm.transport.drained()
            comm.rounds.report(b"")
            comm.idle(comm.rounds.answer, "answer")

    for seed in range(100):
        run_local(seeded(2, seed), work)


def test_leftovers_name_what_was_not_received():
    comms = open_local(2)
    comms[0].mail.post(1, b"lost")
    comms[1].transport.exchange([], [(0, torch.ones(1))])
    assert sorted(leftovers(comms)) == [
        "1 mail from rank 0 to rank 1",
        "1 tensors on channel 0 from rank 0 to rank 1",
    ]
    take(comms[1], [0], "mail")
    comms[0].transport.exchange([(1, torch.ones(1))], [])
    assert leftovers(comms) == []


def test_one_thread_can_drive_all_ranks():
    comms = open_local(3)
    for comm in comms:
        comm.rounds.report(b"%d" % comm.world.rank)
    assert comms[1].rounds.answer() is None
    reports = comms[0].rounds.reports()
    assert reports == [b"0", b"1", b"2"]
    comms[0].rounds.reply(reports)
    assert [comm.rounds.answer() for comm in comms] == reports
