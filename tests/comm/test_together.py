"""What all ranks do before a run."""

from __future__ import annotations

import time

import pytest
from local_ranks import open_local, run_local

from hpc_distkv.comm.together import RankError, SetupError, concluded, together
from hpc_distkv.comm.transport import Comm
from hpc_distkv.model.errors import ModelError


def test_a_rank_that_takes_longer_than_others_is_waited_for():
    def load(comm: Comm) -> int:
        def prepare() -> int:
            time.sleep(0.8 * comm.world.rank)
            return comm.world.rank

        return together(comm, prepare)

    assert run_local(open_local(3, stall_timeout=0.2), load) == [0, 1, 2]


def test_all_ranks_hear_of_a_rank_that_cannot():
    said = []

    def load(comm: Comm) -> None:
        def prepare() -> None:
            if comm.world.rank == 1:
                raise ModelError("a tensor is missing")

        with pytest.raises(SetupError) as error:
            together(comm, prepare)
        said.append(str(error.value))

    run_local(open_local(3), load)
    assert said == ["a tensor is missing (rank 1)"] * 3


def test_a_conclusion_that_fails_is_raised_by_its_rank_and_told_to_the_others():
    full = ModelError("the disk is full")

    def close(comm: Comm) -> BaseException:
        def part() -> None:
            if comm.world.rank == 2:
                raise full

        with pytest.raises((ModelError, RankError)) as error:
            concluded(comm, part)
        assert error.value is comm.agreed
        return error.value

    first, second, third = run_local(open_local(3), close)
    assert third is full
    for told in (first, second):
        assert isinstance(told, RankError)
        assert str(told) == "rank 2 failed: the disk is full"
        assert told.exit_code == 70
