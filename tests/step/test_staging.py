"""rBlocks in the host's memory that are copied, piece by piece, to be attended to: the same results
as with all in one place, whenever copies end; and the choice of what is copied."""

from __future__ import annotations

import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accounting import Account
from clusters import BLOCK, engine_of, options, run, run_cluster, shards, unconstrained
from deferred_copies import DeferredEvent
from families import VOCABULARY as WORDS
from families import save
from late_device import be_late
from local_ranks import open_local, run_local
from seeded_schedule import SeededSchedule
from workloads import crowd, tier

from hpc_distkv.attention import AttentionSpec, PagedBatch, PagedRow, micro_attention
from hpc_distkv.comm.device import Device
from hpc_distkv.control.messages.requests import Request, Sampling, pack_tokens
from hpc_distkv.memory.pool import BlockPool
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.weights import load_decoder
from hpc_distkv.start import host_costs
from hpc_distkv.start.activations import stage
from hpc_distkv.start.host_costs import QUERY_ROWS, attend_seconds, staged_from
from hpc_distkv.step import host_tier as host
from hpc_distkv.step import staging
from hpc_distkv.step.sizes import LargestStep
from hpc_distkv.step.staging import BUFFERS, Staging

KV_HEADS, DIM = 2, 16
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch) -> None:
    monkeypatch.setattr(staging, "PIECE_BLOCKS", 3)


class Seen(DeferredEvent):
    """A copy whose end the host sees at its third look, though what waits for it went on."""

    def __init__(self, log: list[tuple[str, int]], buffer: int, happen) -> None:
        super().__init__(happen)
        self.log, self.buffer, self.looks = log, buffer, 0

    def query(self) -> bool:
        self.looks += self.past
        if self.looks == 3:
            self.log.append(("seen", self.buffer))
        return self.looks >= 3


class AtLast(Device):
    """Copies arrive when something waits for them, and not before: until then there is garbage."""

    deferred = True

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        """("copy" | "wait" | "seen" | "attend", address of a buffer)."""

    def copy_beside(self, sources, targets):
        for target in targets:
            target.fill_(math.nan)
        pairs = list(zip(targets, sources, strict=True))
        buffer = targets[0].data_ptr()
        self.log.append(("copy", buffer))
        return Seen(self.log, buffer, lambda: [to.copy_(source) for to, source in pairs])

    def wait_event(self, event) -> None:
        self.log.append(("wait", event.buffer))
        event.happen()
        event.past = True


class World:
    """Rows of a step, in layers of some specs. The KV of each is cut at random into what is in its
    pool and what is in the host's memory, which the rows of a leg have in common."""

    SLOTS = 100

    def __init__(self, seed: int, specs: list[AttentionSpec], group: int = 2) -> None:
        rng = random.Random(seed)
        torch.manual_seed(seed)
        self.specs, self.size = specs, rng.choice([4, 8])
        shape = (self.SLOTS, len(specs), KV_HEADS, self.size, DIM, torch.float32)
        self.pool, self.host = BlockPool(*shape), BlockPool(*shape)
        for slot in range(self.SLOTS):
            self.pool.rblock(slot).normal_()
            self.host.rblock(slot).normal_()
        here, there = (rng.sample(range(self.SLOTS), self.SLOTS) for _ in range(2))
        self.rows: list[PagedRow] = []
        """Over the pool."""
        self.legs: list[list[PagedRow]] = []
        """Over the host's memory: of all rows in order, but for those that have nothing there."""
        self.asked: list[int] = []
        tokens = 0
        for _ in range(rng.randint(1, 4)):
            blocks = rng.randint(2, 16)
            hosted = rng.sample(range(blocks - 1), rng.randint(0, blocks - 1))
            own = sorted(set(range(blocks)) - set(hosted))
            slots = [there.pop() for _ in hosted]
            leg = []
            for _ in range(rng.choice([1, 1, 2])):
                count = rng.randint(1, self.size)
                position = blocks * self.size - count
                self.rows.append(self._row(count, position, [here.pop() for _ in own], own))
                leg.append(self._row(count, position, slots, hosted))
                if hosted:
                    self.asked += range(tokens, tokens + count)
                tokens += count
            self.legs.append(leg)
        self.q = torch.randn(len(specs), tokens, KV_HEADS * group, DIM)

    def _row(self, count: int, position: int, slots: list[int], indices: list[int]) -> PagedRow:
        first_token = [index * self.size for index in indices]
        return PagedRow(count, position, slots, first_token, len(slots) * self.size)

    def everything(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of each row to all it has, in float64."""
        parts, first = [], 0
        hosted = [row for leg in self.legs for row in leg]
        for row, guest in zip(self.rows, hosted, strict=True):
            q = self.q[layer, first : first + row.queries].double()
            first += row.queries
            pools = ((self.pool, row), (self.host, guest))
            k, v = (
                torch.cat([pool.layer(layer)[which][at.blocks] for pool, at in pools]).double()
                for which in range(2)
            )
            start = torch.tensor([*row.first_token, *guest.first_token])
            at = (start[:, None] + torch.arange(self.size)).flatten()
            queries = row.query_position + torch.arange(row.queries)
            parts.append(dense(q, k, v, queries[:, None] - at[None, :], self.specs[layer]))
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs), torch.cat(lses)

    def merged(self, device: Device, steps: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """As a step of the engine does it."""
        (comm,) = open_local(1)
        comm.device = device
        staged, batch = Staging(comm, self.host, self.specs), PagedBatch.build(self.rows)
        for _ in range(steps):
            staged.begin([leg for leg in self.legs if leg[0].blocks], self.asked)
            results = []
            for layer, spec in enumerate(self.specs):
                q, cache = self.q[layer], self.pool.layer(layer)
                staged.post_queries(q)
                out, lse = micro_attention(q, *cache, batch, spec, causal=True)
                staged.merge(layer, out, lse)
                results.append((out, lse))
        return results


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, distance: torch.Tensor, spec: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [queries, heads, dim], k and v [rBlocks, KV heads, size, dim], distance [queries, keys]."""
    group = q.shape[1] // KV_HEADS
    k, v = (x.transpose(1, 2).flatten(0, 1).repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * spec.scale
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if spec.slopes is not None:
        scores = scores - spec.slopes.double()[:, None, None] * distance
    hidden = distance < 0
    if spec.window:
        hidden = hidden | (distance >= spec.window)
    scores = scores.masked_fill(hidden, -math.inf)
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    return out, scores.logsumexp(-1).T


def assert_close(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> None:
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-5, atol=2e-5)


def specs_of(name: str, layers: int = 3) -> list[AttentionSpec]:
    plain = AttentionSpec(0.25)
    windowed = AttentionSpec(0.25, window=21)
    return {
        "plain": [plain] * layers,
        "softcap": [AttentionSpec(0.25, softcap=3.0)] * layers,
        "alibi": [AttentionSpec(0.25, slopes=SLOPES)] * layers,
        "windows": [windowed, plain, AttentionSpec(0.25, window=50), windowed],
        "windowed alibi": [AttentionSpec(0.25, window=33, slopes=SLOPES), plain],
    }[name]


NAMES = ("plain", "softcap", "alibi", "windows", "windowed alibi")


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", NAMES)
def test_attention_is_that_to_everything_in_one_place(name, seed):
    world = World(seed, specs_of(name))
    for device in (Device(), AtLast()):
        for layer, result in enumerate(world.merged(device, steps=2)):
            assert_close(result, world.everything(layer))


@pytest.mark.parametrize("group", [1, 8])
def test_query_heads_share_kv_heads(group):
    world = World(3, [AttentionSpec(0.25)] * 2, group)
    for layer, result in enumerate(world.merged(AtLast())):
        assert_close(result, world.everything(layer))


@pytest.mark.parametrize("name", NAMES)
def test_a_buffer_is_overwritten_behind_its_readers_and_the_next_piece_is_on_its_way(
    monkeypatch, name
):
    device = AtLast()

    def attended(q, k, v, batch, spec, **others):
        device.log.append(("attend", k.data_ptr()))
        return micro_attention(q, k, v, batch, spec, **others)

    monkeypatch.setattr(staging, "micro_attention", attended)
    World(5, specs_of(name)).merged(device, steps=2)
    buffers = {buffer for _, buffer in device.log}
    assert len(buffers) == BUFFERS
    for buffer in buffers:
        done = [what for what, where in device.log if where == buffer]
        assert done == ["copy", "wait", "attend", "seen"] * (len(done) // 4)
    steps = [device.log[: len(device.log) // 2], device.log[len(device.log) // 2 :]]
    for step in steps:
        done = [what for what, _ in step]
        pieces = done.count("copy")
        assert pieces > 2 * BUFFERS
        for nth, place in enumerate(i for i, what in enumerate(done) if what == "attend"):
            assert done[:place].count("copy") == min(nth + BUFFERS, pieces)


def test_a_layer_copies_what_its_window_shows_and_no_more():
    """The first query, at position 40, sees 31 … 40, so of rBlocks of 4 tokens all from 28 on."""
    leg = [
        PagedRow(6, 40, [9, 8, 7], [24, 28, 32], 12),
        PagedRow(1, 50, [9, 8, 7], [24, 28, 32], 12),
    ]
    for window, slots in ((0, [9, 8, 7]), (10, [8, 7]), (9, [7]), (5, [])):
        pieces = staging.cut(leg, slice(0, 7), AttentionSpec(1.0, window), 4)
        assert [slot for piece in pieces for slot in piece.slots] == slots


def test_pieces_that_are_alike_are_planned_once():
    blocks = list(range(7))
    leg = [PagedRow(2, 40, blocks, [4 * block for block in blocks], 28)]
    for spec, batches in ((AttentionSpec(1.0), 2), (AttentionSpec(1.0, slopes=SLOPES), 3)):
        pieces = list(staging.cut(leg, slice(0, 2), spec, 4))
        assert [len(piece.slots) for piece in pieces] == [3, 3, 1]
        assert len({id(piece.batch) for piece in pieces}) == batches


def test_what_staging_takes_of_the_device_is_counted(whole):
    """With the queries of a whole step, however long the rows are."""
    config, size, tokens = whole.config, 8, 48
    with Account() as account:
        stage(whole, LargestStep(tokens, tokens, size, stages=True))
    pool = BlockPool(90, config.num_layers, config.num_kv_heads, size, config.head_dim, whole.dtype)
    (comm,) = open_local(1)
    blocks = list(range(90))
    leg = [PagedRow(tokens, 90 * size, blocks, [size * block for block in blocks], 90 * size)]
    shape = (tokens, config.num_heads, config.head_dim)
    q, out, lse = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape[:2])
    with Account() as taken:
        staged = Staging(comm, pool, whole.attention)
        staged.begin([leg], range(tokens))
        for layer in range(config.num_layers):
            staged.post_queries(q)
            staged.merge(layer, out, lse)
    assert 0 < taken.peak <= account.peak + 4 * tokens


@pytest.mark.parametrize(("name", "kept"), [("plain", True), ("softcap", True), ("alibi", False)])
def test_what_kernels_keep_of_pieces_does_not_grow_with_the_rows(monkeypatch, name, kept):
    """They keep it of a batch; where positions tell pieces apart, none is used again."""
    used: list[PagedBatch] = []

    def attended(q, k, v, batch, spec, **others):
        used.append(batch)
        return micro_attention(q, k, v, batch, spec, **others)

    monkeypatch.setattr(staging, "micro_attention", attended)
    world = World(5, specs_of(name))
    world.merged(Device())
    distinct = len({id(batch) for batch in used})
    assert distinct <= 2 * len(world.legs) if kept else distinct == len(used)


# -- the choice -----------------------------------------------------------------------------------


def test_a_rank_on_cpus_copies_nothing(model):
    (comm,) = open_local(1)
    pools = [BlockPool(4, 2, 2, BLOCK, 16, torch.float32) for _ in range(2)]
    assert staged_from(comm, *pools, 4, model.attention[0]) == math.inf


@pytest.mark.parametrize(("copying", "attending"), [(3e-6, 1e-6), (1e-7, 3e-8), (2e-8, 9e-8)])
def test_what_takes_less_time_is_chosen(monkeypatch, copying, attending):
    monkeypatch.setattr(host_costs, "token_copy_seconds", lambda *_: copying)
    monkeypatch.setattr(host_costs, "attend_seconds", lambda *_: attending)
    device = SimpleNamespace(place=SimpleNamespace(type="elsewhere"))
    least = staged_from(SimpleNamespace(device=device), None, None, 4, None)
    for rows in range(1, 50):
        for tokens in (8, 1000):
            cheaper = tokens * copying < rows * tokens * attending
            assert (rows >= least) == cheaper or rows == pytest.approx(least)


@pytest.mark.parametrize(("token_seconds", "calls"), [(1e-1, 1), (1e-3, 2), (1e-5, 5), (1e-7, 8)])
@pytest.mark.parametrize("wake", [0.0, 0.01])
def test_the_hosts_processor_is_measured_soon_and_with_work_for_all_threads(
    monkeypatch, token_seconds, calls, wake
):
    """On a clock that goes on with the tokens that are attended to, and with each call."""
    now, asked = [0.0], []

    def attended(q, k, v, batch, spec, **_):
        assert (q.shape, k.shape[1:]) == ((QUERY_ROWS, 6, 16), (2, BLOCK, 16))
        assert not k[: int(batch.blocks.max()) + 1].isnan().any()
        asked.append(int(batch.kv_len[0]))
        now[0] += wake + asked[-1] * token_seconds

    monkeypatch.setattr(host_costs, "micro_attention", attended)
    monkeypatch.setattr(host_costs, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    pool = BlockPool(3, 2, 2, BLOCK, 16, torch.float32)
    for slot in range(3):
        pool.rblock(slot).fill_(math.nan)
    seconds = attend_seconds(pool, 6, AttentionSpec(0.25, window=4))
    assert seconds * QUERY_ROWS == pytest.approx(token_seconds + wake / asked[-1])
    assert len(asked) <= 1 + calls
    assert now[0] < 0.5 or len(asked) == 2


@pytest.mark.parametrize("name", ["plain", "softcap", "alibi", "windows"])
def test_the_hosts_processor_can_be_measured(name):
    pool = BlockPool(3, 1, 2, BLOCK, 16, torch.float32)
    assert 0 < attend_seconds(pool, 4, specs_of(name)[0]) < math.inf


def test_a_copy_can_be_measured():
    (comm,) = open_local(1)
    pools = [BlockPool(count, 2, 2, BLOCK, 16, torch.float32) for count in (2, 5)]
    assert 0 < host_costs.token_copy_seconds(comm, *pools) < math.inf


# -- whole runs -----------------------------------------------------------------------------------


@pytest.fixture
def legs(monkeypatch) -> dict[str, list[int]]:
    """Query rows of all legs of all ranks, in place and staged."""
    found: dict[str, list[int]] = {"in place": [], "staged": []}
    here, there = host.InPlace.begin, Staging.begin

    def in_place(self, rows, tokens):
        by_guests: dict[tuple[int, ...], int] = {}
        for row in rows:
            key = tuple(row.blocks)
            by_guests[key] = by_guests.get(key, 0) + row.queries
        found["in place"] += by_guests.values()
        here(self, rows, tokens)

    def staged(self, legs, tokens):
        found["staged"] += [sum(row.queries for row in leg) for leg in legs]
        there(self, legs, tokens)

    monkeypatch.setattr(host.InPlace, "begin", in_place)
    monkeypatch.setattr(Staging, "begin", staged)
    return found


def force(monkeypatch, least: float) -> None:
    monkeypatch.setattr("hpc_distkv.start.layout.staged_from", lambda *_: least)


@pytest.mark.parametrize("seed", range(6))
def test_staged_rblocks_change_no_token(model, monkeypatch, legs, seed):
    """Copies end when the schedule says."""
    ranks = 1 + seed // 3
    rows = crowd(random.Random(seed), 8, (16 * ranks + 24) * BLOCK)
    least = (1.0, 2.0, 5.0)[seed % 3]
    force(monkeypatch, least)
    settings = tier(16, 24, enable_prefix_caching=seed % 2 == 0)
    outcome = run_cluster(model, rows, ranks, settings, SeededSchedule(seed), prepare=be_late)
    assert outcome.tokens == unconstrained(model, rows)
    assert min(legs["staged"]) >= least
    assert max(legs["in place"], default=0) < least
    assert bool(legs["in place"]) == (least > 1)


def test_prompts_are_staged_and_decodes_are_not(model, monkeypatch, legs):
    force(monkeypatch, 3.0)
    prompt = [random.Random(1).randrange(128) for _ in range(50 * BLOCK)]
    rows = [Request(0, pack_tokens(prompt), Sampling(12))]
    outcome = run_cluster(model, rows, 1, tier(16, 40))
    assert outcome.tokens == unconstrained(model, rows)
    assert set(legs["in place"]) == {1}
    assert max(legs["staged"]) == 64  # tokens of a step


@pytest.mark.parametrize("name", ["bloom", "gemma2", "gemma3", "mistral-window", "gpt2-scaled"])
def test_other_families_are_staged_as_well(monkeypatch, legs, tmp_path: Path, name):
    save(name, tmp_path)
    decoder = load_decoder(tmp_path, ModelConfig.from_dir(tmp_path), "float32", "cpu")
    config, rng = decoder.config, random.Random(2)
    rows = [
        Request(n, pack_tokens([rng.randrange(3, WORDS) for _ in range(length)]), Sampling(20))
        for n, length in enumerate((150, 30, 60))
    ]
    block = 2 * config.num_layers * config.num_kv_heads * config.head_dim * BLOCK * 4
    sizes = {"max_num_batched_tokens": 24, "host_kv_memory": 40 * block}
    force(monkeypatch, 1.0)
    outcome = run_cluster(decoder, rows, 1, options(9, **sizes), SeededSchedule(0), prepare=be_late)
    assert outcome.tokens == run_cluster(decoder, rows, 1, options(400)).tokens
    assert legs["staged"]
    assert not legs["in place"]


def test_all_ranks_of_an_instance_stage_their_part(monkeypatch, legs, tiny_model, whole):
    rows = crowd(random.Random(20), 6, 32 * BLOCK)
    lane_bytes = 3 * 2 * 1 * 16 * BLOCK * 4
    force(monkeypatch, 2.0)
    sizes = {"num_blocks": 16, "host_kv_memory": 16 * lane_bytes}
    outcome = run(tiny_model, rows, 4, 2, SeededSchedule(0), **sizes)
    assert outcome.tokens == unconstrained(whole, rows)
    assert legs["staged"]
    assert legs["in place"]


def test_the_rank_of_an_instance_for_which_copies_pay_least_decides(tiny_model, monkeypatch):
    models = shards(tiny_model, 4, 2)
    monkeypatch.setattr(
        "hpc_distkv.start.layout.staged_from",
        lambda comm, *_: [3.0, 7.0, 5.0, 2.0][comm.world.rank],
    )
    comms = open_local(4, tp=2)

    def joined(comm) -> float:
        engine = engine_of(comm, models[comm.world.rank], options(16, host_kv_memory=1 << 16))
        return engine.config.host_staged_from

    assert run_local(comms, joined) == [7.0, 7.0, 5.0, 5.0]
