"""How many rBlocks a pool on a GPU gets."""

from __future__ import annotations

import math

import pytest

from hpc_distkv.engine.capacity import KvShare, device_blocks, merged
from hpc_distkv.engine.config import OptionError


def test_the_pool_gets_its_part_of_what_is_free_less_what_steps_take():
    assert device_blocks(1000, 100, 0.9, None, block_bytes=10, tokens=8) == 80


def test_a_pool_of_a_given_size_may_take_all_that_steps_leave():
    assert device_blocks(1000, 100, 0.9, 900, block_bytes=10, tokens=8) == 90


def test_a_pool_that_would_leave_no_room_for_steps_is_refused():
    with pytest.raises(OptionError, match=r"is to have 901 bytes.* 100 are for steps of 8 tokens"):
        device_blocks(1000, 100, 0.9, 901, block_bytes=10, tokens=8)


def test_no_room_for_one_block_is_refused_with_the_sums():
    with pytest.raises(OptionError, match=r"takes 50 bytes, but of 0.5 of the 1000 .* 480 are"):
        device_blocks(1000, 480, 0.5, None, block_bytes=50, tokens=8)


def test_ranks_of_an_instance_go_by_the_smallest_pool_and_the_dearest_copies():
    ranks = [KvShare(9, 4, 7, 0.1, 3.0), KvShare(8, 5, 6, 0.2, math.inf)]
    assert merged(ranks) == KvShare(8, 4, 6, 0.2, math.inf)
