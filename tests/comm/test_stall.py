"""Of a hanging job one message tells which rank is to blame."""

from __future__ import annotations

from local_ranks import open_local

from hpc_distkv.comm.stall import MOST_TOLD, Complaint, verdict


def told(ranks: int, *complaints: tuple[int, tuple[int, ...]]) -> list[str]:
    comm = open_local(ranks)[0]
    comm.hear(lambda rank: f"last heard of {rank}")
    lines = [Complaint(rank, awaited, f"{rank} waits") for rank, awaited in complaints]
    return verdict(comm, lines).splitlines()


def test_the_rank_that_is_awaited_and_does_not_wait_is_named_with_all_that_is_known():
    assert told(4, (3, (1,)), (0, (1, 2, 3)), (1, (2,))) == [
        "no answer from rank 2",
        "rank 2: last heard of 2",
        "0 waits",
        "1 waits",
    ]


def test_ranks_that_wait_for_each_other_are_all_told():
    assert told(2, (1, (0,)), (0, (1,)))[1:] == ["0 waits", "1 waits"]


def test_of_a_thousand_silent_ranks_some_are_told():
    lines = told(1000, (0, tuple(range(1, 1000))))
    assert f"rank {MOST_TOLD}, and {999 - MOST_TOLD} more" in lines[0]
    assert len(lines) == 1 + MOST_TOLD + 1 + 1


def test_one_wait_that_is_for_no_rank_is_told_as_it_is():
    own = Complaint(0, (), "rank 0 waits for its disk")
    assert verdict(open_local(2)[0], [own]) == own.text
