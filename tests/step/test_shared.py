"""One call over what many rows share, merged with each row's own part: attention as if each row
had all of its rBlocks for itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from local_ranks import open_local

from hpc_distkv.attention import AttentionSpec
from hpc_distkv.control.messages.requests import Request, Sampling, pack_tokens
from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.decide.plan import Scheduled
from hpc_distkv.decide.sequence import TokenSequence
from hpc_distkv.memory.pool import BlockPool
from hpc_distkv.memory.rmanager import RManager
from hpc_distkv.model.shard import Alone
from hpc_distkv.step import shared
from hpc_distkv.step.forward import Forward
from hpc_distkv.step.model import QueryHeads
from hpc_distkv.step.parts import Parts
from hpc_distkv.step.shared import groups_of
from hpc_distkv.step.timesheet import Recorder, TimeSheet

BLOCK, HEADS, KV_HEADS, DIM = 8, 4, 2, 16
LONG = 6

PROMPTS = {
    # Request → rBlocks of its prompt by content, one letter each, and further tokens.
    0: ("t" * LONG + "a" * LONG + "x", 3),
    1: ("t" * LONG + "a" * LONG, 1),
    2: ("t" * LONG + "a" * LONG + "yy", 5),
    3: ("t" * LONG + "b" * LONG, 2),
    4: ("t" * LONG + "b" * LONG, 9),
    5: ("t" * LONG, 1),
    6: ("zz", 1),
    7: ("zz", 2),
}


@pytest.fixture(autouse=True)
def few_are_worth_it(monkeypatch) -> None:
    monkeypatch.setattr(shared, "LEAST_SAVED", LONG * BLOCK)


def rows_of(rm: RManager) -> list[Scheduled]:
    """A step in which every request computes its last tokens."""
    rows = []
    for number, (text, tokens) in PROMPTS.items():
        keys = [text[: end + 1].encode() for end in range(len(text))]
        table = rm.open(number, keys)
        rm.grow(number, len(text) - table.start)
        rm.prefixes.seal(number, len(text))
        rm.grow(number, -(-tokens // BLOCK))
        prompt = pack_tokens(range(len(text) * BLOCK + tokens))
        sequence = TokenSequence(Request(number, prompt, Sampling(4)), 0.0)
        sequence.computed = len(text) * BLOCK
        rows.append(Scheduled(sequence, tokens))
    return rows


class OneLayer:
    """A model whose only layer is attention to random queries, keys and values."""

    needs_lengths = False
    lanes = Alone()

    def __init__(self, spec: AttentionSpec, tokens: int) -> None:
        self.attention = [spec]
        self.q = torch.randn(tokens, HEADS, DIM)
        self.k, self.v = torch.randn(2, tokens, KV_HEADS, DIM)
        self.out = torch.empty(0)

    def hidden(self, tokens, positions, attend: Callable, pause, lengths) -> torch.Tensor:
        self.out = attend(0, torch.cat((self.q, self.k), 1), self.v, None)
        return torch.zeros(len(tokens), 1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def alone(rm: RManager, pool: BlockPool, row: Scheduled, q: torch.Tensor, spec: AttentionSpec):
    """float64: the row's queries over all tokens before them, read through its block tables."""
    place = {}
    for table in rm.parts(row.sequence.id).values():
        place |= dict(zip(table.indices, table.slots, strict=True))
    k_cache, v_cache = (cache.double() for cache in pool.layer(0))
    out = torch.empty(row.tokens, HEADS, DIM, dtype=torch.float64)
    for query in range(row.tokens):
        at = row.sequence.computed + query
        first = max(0, at - spec.window + 1) if spec.window else 0
        slots = [divmod(position, BLOCK) for position in range(first, at + 1)]
        k = torch.stack([k_cache[place[block], :, inside] for block, inside in slots])
        v = torch.stack([v_cache[place[block], :, inside] for block, inside in slots])
        for head in range(HEADS):
            kv_head = head // (HEADS // KV_HEADS)
            scores = k[:, kv_head] @ q[query, head].double() * spec.scale
            if spec.slopes is not None:
                scores -= spec.slopes[head] * (at - torch.arange(first, at + 1))
            out[query, head] = scores.softmax(0) @ v[:, kv_head]
    return out


@pytest.mark.parametrize(
    "spec",
    [
        AttentionSpec(0.3),
        AttentionSpec(0.3, window=LONG * BLOCK),
        AttentionSpec(0.3, slopes=torch.tensor([0.5, 0.1, 0.02, 0.004])),
    ],
    ids=["plain", "window", "slopes"],
)
def test_rows_get_the_attention_that_they_would_get_alone(spec):
    torch.manual_seed(0)
    rm = RManager(0, 100)
    rows = rows_of(rm)
    pool = BlockPool(100, 1, KV_HEADS, BLOCK, DIM, torch.float32)
    for slot in range(100):
        pool.rblock(slot).normal_()
    model = OneLayer(spec, sum(row.tokens for row in rows))
    (comm,) = open_local(1)
    config, time = EngineConfig(num_blocks=100, block_size=BLOCK), TimeSheet(Recorder())
    parts = Parts(
        comm=comm, model=model, pool=pool, config=config, heads=QueryHeads(HEADS, DIM), time=time
    )
    Forward(parts, rm, lambda: None, lambda: None).run(rows)
    first = 0
    for row in rows:
        part = slice(first, first := first + row.tokens)
        want = alone(rm, pool, row, model.q[part], spec)
        torch.testing.assert_close(model.out[part].double(), want, rtol=1e-4, atol=1e-5)


def test_the_longest_common_part_of_every_set_of_rows_is_one_group():
    rm = RManager(0, 100)
    groups = groups_of(rm, rows_of(rm), BLOCK)
    texts = {
        places: b"".join(key[-1:] for prefix in prefixes for key in prefix.keys).decode()
        for places, prefixes in groups.items()
    }
    assert texts == {
        (0, 1, 2, 3, 4, 5): "t" * LONG,
        (0, 1, 2): "a" * LONG,
        (3, 4): "b" * LONG,
    }, "what 6 and 7 share is not worth it"


def test_a_row_is_in_a_few_groups_at_most_those_that_spare_most(monkeypatch):
    monkeypatch.setattr(shared, "MOST_SHARED", 1)
    rm = RManager(0, 100)
    assert set(groups_of(rm, rows_of(rm), BLOCK)) == {(0, 1, 2, 3, 4, 5)}
    test_rows_get_the_attention_that_they_would_get_alone(AttentionSpec(0.3))
