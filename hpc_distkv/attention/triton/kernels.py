"""The Triton kernels: MicroAttention over paged rBlocks, its merges, the rotation with the
cache write.

Needs triton, which decides at import, by TRITON_INTERPRET, whether the kernels are compiled or run
in its interpreter; so this module is imported only when `backend.kernels` needs it.

Sources: online softmax and tiling, FlashAttention (arXiv 2205.14135, 2307.08691); splits over the
KV length, Flash-Decoding (PyTorch blog, 2023) and FlashInfer (arXiv 2501.01005).
"""

import triton
import triton.language as tl

from hpc_distkv.attention.triton.worklist import ITEM_SIZE, MERGE_SIZE

ITEM = tl.constexpr(ITEM_SIZE)
MERGE = tl.constexpr(MERGE_SIZE)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def attend(
    q,
    k_cache,
    v_cache,
    out,
    lse,
    part_out,
    part_lse,
    items,
    blocks,
    first_token,
    slopes,
    q_stride,
    k_stride,
    v_stride,
    scale,
    softcap,
    window,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LINES: tl.constexpr,
    KEYS: tl.constexpr,
    POSITIONS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SLOPES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: one item of the worklist and one KV head. A line of its tile is one query of one
    of the head's GROUP query heads, so they share the loads of K and V. WIDTH is DIM or the power
    of two above it. Keys are counted by their index in the row's list of rBlocks."""
    program = tl.program_id(0)
    head = program % KV_HEADS
    item = items + (program // KV_HEADS) * ITEM
    query = tl.load(item).to(tl.int64)
    count = tl.load(item + 1)
    position = tl.load(item + 2)
    table = tl.load(item + 3)
    begin = tl.load(item + 4)
    full = tl.load(item + 5)
    end = tl.load(item + 6)
    slot = tl.load(item + 7)

    line = tl.arange(0, LINES)
    nth = line // GROUP
    real = nth < count
    q_head = head * GROUP + line % GROUP
    d = tl.arange(0, WIDTH)
    inside = real[:, None] & (d < DIM)[None, :]
    where = (query + nth)[:, None] * q_stride + q_head[:, None] * DIM + d[None, :]
    lines = tl.load(q + where, mask=inside, other=0.0)
    slope = tl.zeros([LINES], tl.float32)
    if SLOPES:
        slope = tl.load(slopes + q_head, mask=real, other=0.0)

    k_head = k_cache + head * BLOCK_SIZE * DIM
    v_head = v_cache + head * BLOCK_SIZE * DIM
    top = tl.full([LINES], float("-inf"), tl.float32)
    total = tl.zeros([LINES], tl.float32)
    mixed = tl.zeros([LINES, WIDTH], tl.float32)
    edge = begin + (full - begin) // KEYS * KEYS
    block = _blocks(blocks, table, begin, end, BLOCK_SIZE, KEYS)
    for start in range(begin, edge, KEYS):
        mixed, total, top = _tile(
            mixed, total, top, lines, block, k_head, v_head, first_token, slope,
            k_stride, v_stride, scale, softcap, window, position + nth, table, start, end,
            DIM, WIDTH, BLOCK_SIZE, KEYS, False, False, False, False, SOFTCAP, SLOPES, PRECISION,
        )  # fmt: skip
        block = _blocks(blocks, table, start + KEYS, end, BLOCK_SIZE, KEYS)
    for start in range(edge, end, KEYS):
        mixed, total, top = _tile(
            mixed, total, top, lines, block, k_head, v_head, first_token, slope,
            k_stride, v_stride, scale, softcap, window, position + nth, table, start, end,
            DIM, WIDTH, BLOCK_SIZE, KEYS, True, POSITIONS, CAUSAL, WINDOW, SOFTCAP, SLOPES,
            PRECISION,
        )  # fmt: skip
        block = _blocks(blocks, table, start + KEYS, end, BLOCK_SIZE, KEYS)

    some = total > 0
    total = tl.where(some, total, 1.0)
    mixed = mixed / total[:, None]
    natural = tl.where(some, (top + tl.log2(total)) * LN_2, float("-inf"))
    heads: tl.constexpr = KV_HEADS * GROUP
    if slot < 0:
        place = (query + nth) * heads + q_head
        tl.store(lse + place, natural, mask=real)
        tl.store(out + place[:, None] * DIM + d[None, :], mixed, mask=inside)
    else:
        place = (slot.to(tl.int64) + nth) * heads + q_head
        tl.store(part_lse + place, natural, mask=real)
        tl.store(part_out + place[:, None] * DIM + d[None, :], mixed, mask=inside)


@triton.jit
def _blocks(blocks, table, start, end, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr):
    """The rBlock of each of KEYS keys. Loaded a turn of the loop ahead: K and V cannot be asked for
    before it is there."""
    key = start + tl.arange(0, KEYS)
    return tl.load(blocks + table + key // BLOCK_SIZE, mask=key < end, other=0).to(tl.int64)


@triton.jit
def _tile(
    mixed,
    total,
    top,
    lines,
    block,
    k_head,
    v_head,
    first_token,
    slope,
    k_stride,
    v_stride,
    scale,
    softcap,
    window,
    position,
    table,
    start,
    end,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    POSITIONS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SLOPES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """KEYS keys from `start`: online softmax in base 2. Unless MASKED, all lines see all of them;
    what is not seen is not read either, for it may hold anything."""
    key = start + tl.arange(0, KEYS)
    d = tl.arange(0, WIDTH)
    here = key < end
    offset = (key % BLOCK_SIZE * DIM)[:, None] + d[None, :]
    k_at = k_head + (block * k_stride)[:, None] + offset
    v_at = v_head + (block * v_stride)[:, None] + offset
    if MASKED:
        inside = here[:, None] & (d < DIM)[None, :]
        k = tl.load(k_at, mask=inside, other=0.0)
        v = tl.load(v_at, mask=inside, other=0.0)
    elif WIDTH > DIM:
        k = tl.load(k_at, mask=(d < DIM)[None, :], other=0.0)
        v = tl.load(v_at, mask=(d < DIM)[None, :], other=0.0)
    else:
        k = tl.load(k_at)
        v = tl.load(v_at)

    scores = tl.dot(lines, tl.trans(k), input_precision=PRECISION)
    unit = scale * LOG2_E
    if SOFTCAP:
        scores = (2.0 * tl.sigmoid(scores * (2.0 * scale / softcap)) - 1.0) * softcap
        unit = LOG2_E
    if POSITIONS or SLOPES:
        first = tl.load(first_token + table + key // BLOCK_SIZE, mask=here, other=0)
        distance = position[:, None] - (first + key % BLOCK_SIZE)[None, :]
    if SLOPES:
        if not SOFTCAP:
            scores = scores * scale
            unit = LOG2_E
        scores = scores - slope[:, None] * distance.to(tl.float32)
    if MASKED:
        seen = here[None, :]
        if POSITIONS:
            if CAUSAL:
                seen = seen & (distance >= 0)
            if WINDOW:
                seen = seen & (distance < window)
        scores = tl.where(seen, scores, float("-inf"))

    higher = tl.maximum(top, tl.max(scores, 1) * unit)
    shift = higher
    if MASKED:
        shift = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores * unit - shift[:, None])
    fade = tl.exp2(top - shift)
    total = total * fade + tl.sum(weights, 1)
    mixed = tl.dot(weights.to(v.dtype), v, mixed * fade[:, None], input_precision=PRECISION)
    return mixed, total, higher


@triton.jit
def combine(
    part_out,
    part_lse,
    out,
    lse,
    merges,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One program: one query and head whose keys were split; merges its partial results."""
    merge = merges + tl.program_id(0) * MERGE
    head = tl.program_id(1)
    query = tl.load(merge).to(tl.int64)
    slot = tl.load(merge + 1).to(tl.int64)
    step = tl.load(merge + 2)
    count = tl.load(merge + 3)
    d = tl.arange(0, WIDTH)
    top = -float("inf")
    total = 0.0
    mixed = tl.zeros([WIDTH], tl.float32)
    for start in range(0, count, PARTS):
        part = start + tl.arange(0, PARTS)
        place = (slot + part * step) * HEADS + head
        some = part < count
        theirs = tl.load(part_lse + place, mask=some, other=float("-inf"))
        inside = some[:, None] & (d < DIM)[None, :]
        values = tl.load(part_out + place[:, None] * DIM + d[None, :], mask=inside, other=0.0)
        higher = tl.maximum(top, tl.max(theirs, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(theirs - shift)
        fade = tl.exp(top - shift)
        mixed = mixed * fade + tl.sum(values * weights[:, None], 0)
        total = total * fade + tl.sum(weights, 0)
        top = higher
    some_keys = total > 0
    total = tl.where(some_keys, total, 1.0)
    place = query * HEADS + head
    tl.store(lse + place, tl.where(some_keys, top + tl.log(total), float("-inf")))
    tl.store(out + place * DIM + d, mixed / total, mask=d < DIM)


@triton.jit
def merge_rows(
    out,
    lse,
    rows,
    part_out,
    part_lse,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: one row's partial result of TILE heads, merged into the row it belongs to."""
    part = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + part).to(tl.int64)
    head = tl.program_id(1) * TILE + tl.arange(0, TILE)
    d = tl.arange(0, WIDTH)
    real = head < HEADS
    inside = real[:, None] & (d < DIM)[None, :]
    mine_at, theirs_at = row * HEADS + head, part * HEADS + head
    mine = tl.load(lse + mine_at, mask=real, other=float("-inf"))
    theirs = tl.load(part_lse + theirs_at, mask=real, other=float("-inf"))
    higher = tl.maximum(mine, theirs)
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    keep, take = tl.exp(mine - shift), tl.exp(theirs - shift)
    some = keep + take > 0
    total = tl.where(some, keep + take, 1.0)
    share = 1.0 / total
    at = mine_at[:, None] * DIM + d[None, :]
    kept = tl.load(out + at, mask=inside, other=0.0)
    taken = tl.load(part_out + theirs_at[:, None] * DIM + d[None, :], mask=inside, other=0.0)
    merged = kept * (keep * share)[:, None] + taken * (take * share)[:, None]
    tl.store(out + at, merged, mask=inside)
    tl.store(lse + mine_at, tl.where(some, shift + tl.log(total), float("-inf")), mask=real)


@triton.jit
def rotate_and_write(
    qk,
    v,
    q,
    k_cache,
    v_cache,
    cos,
    sin,
    blocks,
    offsets,
    qk_from,
    v_from,
    table_stride,
    k_stride,
    v_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: TILE heads of one token. Queries turn and go to q, keys turn and go into the
    token's rBlock, values go there as they are. Of a head the first ROTARY numbers turn, i and
    i + ROTARY / 2 as a pair; sin carries the sign of the half."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TILE + tl.arange(0, TILE)
    d = tl.arange(0, WIDTH)
    some = (d < DIM)[None, :]
    at = qk + token * qk_from + head[:, None] * DIM
    inside = (head < HEADS + KV_HEADS)[:, None] & some
    turned = tl.load(at + d[None, :], mask=inside, other=0.0)
    if ROTARY:
        turns = d < ROTARY
        other = tl.where(d < ROTARY // 2, d + ROTARY // 2, d - ROTARY // 2)
        pair = tl.load(at + other[None, :], mask=inside & turns[None, :], other=0.0)
        c = tl.load(cos + token * table_stride + d, mask=turns, other=1.0).to(tl.float32)
        s = tl.load(sin + token * table_stride + d, mask=turns, other=0.0).to(tl.float32)
        rotated = turned.to(tl.float32) * c[None, :] + pair.to(tl.float32) * s[None, :]
        turned = rotated.to(q.dtype.element_ty)
    query = (token * HEADS + head)[:, None] * DIM + d[None, :]
    tl.store(q + query, turned, mask=(head < HEADS)[:, None] & some)

    block = tl.load(blocks + token).to(tl.int64)
    within = tl.load(offsets + token)
    key = head - HEADS
    to = (key * BLOCK_SIZE + within)[:, None] * DIM + d[None, :]
    mine = ((key >= 0) & (key < KV_HEADS))[:, None] & some
    tl.store(k_cache + block * k_stride + to, turned, mask=mine)
    value = key - KV_HEADS
    to = (value * BLOCK_SIZE + within)[:, None] * DIM + d[None, :]
    mine = ((value >= 0) & (value < KV_HEADS))[:, None] & some
    new = tl.load(v + token * v_from + value[:, None] * DIM + d[None, :], mask=mine)
    tl.store(v_cache + block * v_stride + to, new, mask=mine)
