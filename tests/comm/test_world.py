from __future__ import annotations

import pytest

from hpc_distkv.comm.world import World


def test_places_on_nodes():
    worlds = [World(rank, (0, 1, 0, 1, 1)) for rank in range(5)]
    assert [world.local_rank for world in worlds] == [0, 0, 1, 1, 2]
    assert [world.local_size for world in worlds] == [2, 3, 2, 3, 3]


def test_instances_and_lanes():
    world = World(3, (0, 0, 0, 0, 1, 1), tp=2)
    assert (world.instances, world.instance, world.lane) == (3, 1, 1)
    assert [world.rank_of(instance) for instance in range(3)] == [1, 3, 5]
    assert [world.node_of(instance) for instance in range(3)] == [0, 0, 1]


def test_ranks_that_make_no_whole_instances_are_refused():
    with pytest.raises(ValueError, match="start a multiple of 2"):
        World(0, (0, 0, 0), tp=2)


def test_names():
    assert World(0, (0, 0)).name(1) == "rank 1"
    assert World(0, (0, 1), hosts=("a", "b")).name(1) == "rank 1 on b"
