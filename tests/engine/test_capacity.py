"""How many rBlocks a pool on a GPU gets."""

from __future__ import annotations

import pytest

from hpc_distkv.engine.capacity import device_blocks
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
