from __future__ import annotations

from pathlib import Path

import group_contract
import pytest
from group_contract import CONTRACT
from local_ranks import leftovers, open_local, run_local
from mpirun import mpirun, run_mpi
from recorded_fabric import connect
from seeded_schedule import SeededSchedule

from hpc_distkv.comm.collective.group import Group
from hpc_distkv.comm.transport import Comm

SCRIPT = str(Path(__file__).with_name("group_contract.py"))


@pytest.mark.parametrize("promise", CONTRACT, ids=lambda promise: promise.__name__)
@pytest.mark.parametrize(("ranks", "tp"), [(2, 2), (4, 2), (4, 4), (3, 3), (6, 1)])
def test_threads_keep_the_contract(promise, ranks, tp):
    comms = open_local(ranks, stall_timeout=20, tp=tp)
    run_local(comms, promise)
    assert leftovers(comms) == []


@pytest.mark.parametrize("promise", CONTRACT, ids=lambda promise: promise.__name__)
@pytest.mark.parametrize("seed", range(3))
def test_interleavings_keep_the_contract(promise, seed):
    comms = open_local(6, tp=3, schedule=SeededSchedule(seed))
    run_local(comms, promise)
    assert leftovers(comms) == []


def in_steps(promise):
    """The promise, kept in steps that wait for no other instance."""

    class Steps(Group):
        def __init__(self, comm: Comm) -> None:
            comm.transport.unite(comm)
            super().__init__(comm)
            self.begin(independent=True)

    def kept(comm: Comm) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(group_contract, "Group", Steps)
            promise(comm)

    return kept


@pytest.mark.parametrize("promise", CONTRACT[:2], ids=lambda promise: promise.__name__)
@pytest.mark.parametrize("seed", range(3))
def test_hops_that_no_host_waits_for_keep_the_contract(promise, seed):
    comms = open_local(6, tp=3, schedule=SeededSchedule(seed))
    fabric = connect(comms)
    run_local(comms, in_steps(promise))
    assert leftovers(comms) == []
    assert {(0, 1, 2), (3, 4, 5)} == set(fabric.hops)


@pytest.mark.skipif(mpirun() is None, reason="needs mpirun")
def test_mpi_ranks_keep_the_contract():
    ran = run_mpi(4, [SCRIPT, "2"], timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [f"kept: {promise.__name__}" for promise in CONTRACT]
