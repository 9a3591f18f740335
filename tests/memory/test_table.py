"""Block tables against a plain list of places, and pools against plain indexing."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from hpc_distkv.memory.pool import BlockPool
from hpc_distkv.memory.table import BlockTable

HOME = -1


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 99)), max_size=60))
def test_a_table_knows_where_every_rblock_is_whatever_came_and_went(acts):
    table = BlockTable()
    places: list[tuple[int, int]] = []
    """Logical index → (home or creditor, slot)."""
    for act, choice in acts:
        at_home = [i for i, (where, _) in enumerate(places) if where == HOME]
        away = [i for i, (where, _) in enumerate(places) if where != HOME]
        if act == 0 or not places:
            places.append((HOME, 1000 + len(places)))
            table.add(places[-1][1])
        elif act == 1 and at_home[:-1]:  # the tail stays
            index = at_home[choice % (len(at_home) - 1)]
            assert table.to_creditor(index, choice % 3) == places[index][1]
            places[index] = (choice % 3, 0)
        elif act >= 2 and away:
            index = away[choice % len(away)]
            table.to_home(index, places[index][0], 2000 + choice)
            places[index] = (HOME, 2000 + choice)
        home = [(i, slot) for i, (where, slot) in enumerate(places) if where == HOME]
        assert list(zip(table.indices, table.slots, strict=True)) == home
        assert all(table.place(index) == at for at, (index, _) in enumerate(home))
        assert table.blocks == len(places)
        assert table.remote_blocks == len(places) - len(home)
        for creditor in range(3):
            hosted = {i for i, (where, _) in enumerate(places) if where == creditor}
            assert set(table.remote.get(creditor, ())) == hosted
            assert creditor not in table.remote or hosted


def test_an_rblock_is_one_piece_of_memory_with_all_layers():
    pool = BlockPool(3, layers=2, kv_heads=2, block_size=4, head_dim=8, dtype=torch.float16)
    assert (pool.num_blocks, pool.layers, pool.dtype) == (3, 2, torch.float16)
    for slot in range(3):
        pool.rblock(slot).fill_(slot)
    k, v = pool.layer(1)
    assert k.shape == v.shape == (3, 2, 4, 8)
    k[1, 0, 2] = 7
    v[2, 1, 3] = 9
    assert pool.rblock(1).is_contiguous()
    assert (pool.rblock(1)[1, 0, 0, 2] == 7).all()
    assert (pool.rblock(2)[1, 1, 1, 3] == 9).all()
    assert pool.rblock(1).float().sum() == pool.rblock(1).numel() + 8 * 6
    assert (pool.rblock(0) == 0).all()
