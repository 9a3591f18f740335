"""Which device is whose."""

from __future__ import annotations

import pytest
from local_ranks import open_local, run_local

from hpc_distkv.comm.binding import _by_nccl, bind
from hpc_distkv.comm.device import DeviceError, Sight, fault, own_index
from hpc_distkv.comm.world import World

TWO_NODES = World(0, (0, 0, 1, 1), hosts=("a", "a", "b", "b"))
ALL_SEE = [Sight(2, "u0"), Sight(2, "u1"), Sight(2, "u2"), Sight(2, "u3")]
BLIND = Sight(0)


def test_ranks_of_a_node_take_its_devices_in_turn():
    assert [own_index(4, local_rank) for local_rank in range(4)] == [0, 1, 2, 3]


def test_a_rank_that_sees_its_own_device_alone_takes_it():
    assert [own_index(1, local_rank) for local_rank in range(4)] == [0, 0, 0, 0]


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_a_device_for_each_rank_is_fine(wanted):
    assert fault(ALL_SEE, TWO_NODES, wanted, sharing=False) is None


@pytest.mark.parametrize("wanted", ["auto", "cpu"])
def test_no_device_at_all_is_fine_unless_one_was_asked_for(wanted):
    assert fault([BLIND] * 4, TWO_NODES, wanted, sharing=False) is None


def test_a_rank_without_a_device_is_named_and_told_what_to_do():
    said = fault([*ALL_SEE[:3], BLIND], TWO_NODES, "cuda", sharing=False)
    assert "rank 3 on b sees no CUDA device" in said
    assert "--gpus-per-node" in said


def test_some_ranks_on_devices_and_some_without_are_refused():
    said = fault([*ALL_SEE[:3], BLIND], TWO_NODES, "auto", sharing=True)
    assert "rank 0 on a sees a CUDA device and rank 3 on b sees none" in said
    assert "--device cpu" in said


def test_two_ranks_with_one_device_are_refused_unless_they_may_share():
    sights = [Sight(1, "u0"), Sight(1, "u1"), Sight(1, "u2"), Sight(1, "u2")]
    said = fault(sights, TWO_NODES, "cuda", sharing=False)
    assert "rank 2 on b and rank 3 on b would share one GPU, u2" in said
    assert "--allow-gpu-sharing" in said
    assert fault(sights, TWO_NODES, "cuda", sharing=True) is None


def test_all_ranks_hear_that_one_lacks_a_device(monkeypatch):
    sights = iter([Sight(1, "u0"), BLIND])
    monkeypatch.setattr("hpc_distkv.comm.gpu.cuda.look", lambda wanted, local_rank: next(sights))
    heard = []

    def body(comm):
        with pytest.raises(DeviceError) as raised:
            bind(comm, "cuda")
        heard.append(str(raised.value))

    run_local(open_local(2), body)
    assert heard[0] == heard[1]
    assert "sees no CUDA device" in heard[0]


def test_a_world_without_devices_stays_on_the_host():
    (comm,) = open_local(1)
    before = comm.transport
    bind(comm, "cpu")
    assert comm.transport is before
    assert comm.device.place.type == "cpu"


def test_some_rank_without_nccl_sends_all_by_way_of_the_host_or_is_named(monkeypatch, caplog):
    found = [(22809, ""), (0, "CuPy is missing")]
    monkeypatch.setattr("hpc_distkv.comm.gpu.nccl.usable", lambda: found[chosen.pop()])

    def way(comm, transport, sights=ALL_SEE[:2]):
        try:
            return _by_nccl(comm, transport, sights)
        except DeviceError as error:
            return str(error)

    chosen = [0, 1]
    assert run_local(open_local(2), lambda comm: way(comm, "auto")) == [False, False]
    assert "by way of the host" in caplog.text
    chosen = [0, 1]
    said = run_local(open_local(2), lambda comm: way(comm, "nccl"))
    assert said[0] == said[1]
    assert "CuPy is missing" in said[0]
    chosen = [0, 0]
    assert run_local(open_local(2), lambda comm: way(comm, "auto")) == [True, True]
    chosen = []
    assert run_local(open_local(2), lambda comm: way(comm, "mpi")) == [False, False]
    parts = Sight(1, "u0", True), Sight(1, "u1", True)
    chosen = [0, 0]
    assert run_local(open_local(2), lambda comm: way(comm, "auto", parts)) == [False, False]
    chosen = [0, 0]
    assert run_local(open_local(2), lambda comm: way(comm, "nccl", parts)) == [True, True]
    chosen = [0, 0]
    same = Sight(1, "u0"), Sight(1, "u0")
    assert run_local(open_local(2), lambda comm: way(comm, "auto", same)) == [False, False]
