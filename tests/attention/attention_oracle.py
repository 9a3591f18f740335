"""Dense softmax attention in float64, one query and head at a time, and random paged batches."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from hpc_distkv.attention import AttentionSpec, PagedBatch, PagedRow, Rotation, rotate_and_write

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass
class Case:
    """A call of micro_attention; its caches are strided views of a pool of two layers."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    rows: list[PagedRow]
    spec: AttentionSpec
    causal: bool

    @property
    def batch(self) -> PagedBatch:
        return PagedBatch.build(self.rows)

    def subset(self, indices: list[int]) -> Case:
        """The same call with only these rows."""
        ends = np.cumsum([row.queries for row in self.rows])
        parts = [self.q[ends[i] - self.rows[i].queries : ends[i]] for i in indices]
        rows = [self.rows[i] for i in indices]
        q = torch.cat(parts) if parts else self.q[:0]
        return replace(self, q=q, rows=rows)


def random_case(
    seed: int,
    *,
    shapes: list[tuple[int, int]],
    kv_heads: int = 2,
    group: int = 2,
    dim: int = 32,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    causal: bool = True,
    holes: bool = True,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    slopes: bool = False,
) -> Case:
    """shapes: (queries, tokens) per row. With holes, rBlocks skip positions and queries start
    anywhere, so that causal masks cut through rBlocks or leave queries without keys; but slopes
    without causality are for guests, whose keys are all in the past."""
    random = np.random.default_rng(seed)
    counts = [-(-tokens // block_size) for _, tokens in shapes]
    num_blocks = sum(counts) + 3
    free = random.permutation(num_blocks).tolist()
    rows = []
    for (queries, tokens), count in zip(shapes, counts, strict=True):
        places = np.arange(count)
        if holes:
            places = np.sort(random.choice(2 * count + 1, count, replace=False))
        first = (places * block_size).tolist()
        end = first[-1] + block_size if count else 0
        position = int(random.integers(0, end + 1)) if holes else tokens - queries
        if slopes and not causal:
            position = end
        rows.append(PagedRow(queries, position, [free.pop() for _ in range(count)], first, tokens))
    queries = sum(row.queries for row in rows)
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(num_blocks, 2, 2, kv_heads, block_size, dim, generator=generator).to(dtype)
    q = torch.randn(queries, kv_heads * group, dim, generator=generator).to(dtype)
    spec = AttentionSpec(
        dim**-0.5 if scale is None else scale,
        window,
        softcap,
        torch.rand(kv_heads * group, generator=generator) if slopes else None,
    )
    return Case(q, pool[:, 1, 0], pool[:, 1, 1], rows, spec, causal)


@st.composite
def cases(draw) -> Case:
    row = st.tuples(
        st.one_of(st.just(1), st.just(0), st.integers(2, 5), st.integers(17, 40)),
        st.one_of(st.just(0), st.just(1), st.integers(2, 150)),
    )
    return random_case(
        draw(st.integers(0, 2**31)),
        shapes=draw(st.lists(row, min_size=0, max_size=4)),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 8)),
        dim=draw(st.sampled_from([16, 20, 32, 48, 64, 80, 96, 128, 256])),
        block_size=draw(st.sampled_from([1, 3, 8, 16, 24, 64, 100])),
        dtype=draw(st.sampled_from(DTYPES)),
        causal=draw(st.booleans()),
        holes=draw(st.booleans()),
        window=draw(st.sampled_from([0, 0, 1, 5, 16, 70, 1000])),
        softcap=draw(st.sampled_from([0.0, 0.0, 2.0, 50.0])),
        slopes=draw(st.booleans()),
    )


def dense(case: Case) -> tuple[Tensor, Tensor]:
    """The oracle: (out, lse) in float64."""
    q = case.q.double().numpy()
    k_cache, v_cache = case.k_cache.double().numpy(), case.v_cache.double().numpy()
    heads, kv_heads, spec = q.shape[1], k_cache.shape[1], case.spec
    slopes = np.zeros(heads) if spec.slopes is None else spec.slopes.double().numpy()
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    query = 0
    for row in case.rows:
        keys = list(_keys(row, k_cache.shape[2]))
        for offset in range(row.queries):
            at = row.query_position + offset
            last = at if case.causal else np.inf
            first = at - spec.window + 1 if spec.window else -np.inf
            seen = [key for key in keys if first <= key[2] <= last]
            distance = np.array([at - position for _, _, position in seen])
            for head in range(heads if seen else 0):
                kv_head = head // (heads // kv_heads)
                k = np.array([k_cache[block, kv_head, inside] for block, inside, _ in seen])
                v = np.array([v_cache[block, kv_head, inside] for block, inside, _ in seen])
                scores = k @ q[query, head] * spec.scale
                if spec.softcap:
                    scores = spec.softcap * np.tanh(scores / spec.softcap)
                scores = scores - slopes[head] * distance
                weights = np.exp(scores - scores.max())
                out[query, head] = weights @ v / weights.sum()
                lse[query, head] = scores.max() + np.log(weights.sum())
            query += 1
    return torch.from_numpy(out), torch.from_numpy(lse)


def _keys(row: PagedRow, block_size: int):
    for index in range(row.kv_len):
        block, inside = divmod(index, block_size)
        yield row.blocks[block], inside, row.first_token[block] + inside


def assert_close(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], tol: float = 2e-5):
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=tol, atol=tol)


def check_turn(rotary: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """`rotate_and_write` of 5 tokens with 3 query and 2 KV heads, views of one projection, against
    complex numbers in float64; nothing but the tokens' slots is written."""
    generator = torch.Generator().manual_seed(2)
    fused = torch.randn(5, 7, dim, generator=generator).to(dtype)
    angles = torch.rand(5, 1, rotary // 2, generator=generator) * 7
    cos, sin = angles.cos().repeat(1, 1, 2), angles.sin().repeat(1, 1, 2)
    sin[..., : rotary // 2] *= -1
    cos, sin = cos.to(dtype), sin.to(dtype)
    half = rotary // 2
    pairs = torch.complex(fused[:, :5, :half].double(), fused[:, :5, half:rotary].double())
    turned = pairs * torch.complex(cos[..., half:].double(), sin[..., half:].double())
    want = torch.cat((turned.real, turned.imag, fused[:, :5, rotary:].double()), -1)
    pool = torch.randn(8, 3, 2, 2, 16, dim, generator=generator).to(dtype)
    blocks = torch.randint(0, 8, (5,), generator=generator, dtype=torch.int32)
    offsets = torch.randperm(16, generator=generator)[:5].int()
    on, new = pool.to(device), fused.to(device)
    rotation = Rotation(cos.to(device), sin.to(device))
    q = rotate_and_write(
        new[:, :5], new[:, 5:], rotation, on[:, 2, 0], on[:, 2, 1], blocks, offsets
    )
    wanted = pool.double()
    for token, (block, offset) in enumerate(zip(blocks, offsets, strict=True)):
        wanted[block, 2, 0, :, offset] = want[token, 3:]
        wanted[block, 2, 1, :, offset] = fused[token, 5:].double()
    tol = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(q.cpu().double(), want[:, :3], rtol=tol, atol=tol)
    torch.testing.assert_close(on.cpu().double(), wanted, rtol=tol, atol=tol)
    untouched = torch.ones(8, 16, dtype=torch.bool)
    untouched[blocks.long(), offsets.long()] = False
    rest = untouched[:, None, None, None, :, None].expand_as(pool)
    assert torch.equal(on.cpu()[rest], pool[rest])
