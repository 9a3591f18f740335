"""GPU memory that a step needs besides weights and pool: measured by running the largest step
beforehand, or counted where a step takes other ranks.

    measured  the largest step of a rank's own rows: tables and tokens, layers, sums over the lanes
              of its instance, what rows share attended to apart, logits, all that sampling knows
    measured  beside it, on a stream of its own: attention to guests
    measured  beside both: a decode step that is recorded, in memory of its own
    measured  likewise: buffers for rBlocks of the host's memory, and attention to these
    counted   queries and partial results under way: to and from creditors, from and to debtors
    counted   lists of rBlocks beyond the rehearsed context

Not in it: what CUDA itself keeps of recorded steps, and more than `PROMPTS` others that exchange a
whole prompt chunk with this rank at once. Those are left to what `--gpu-memory-utilization` spares.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hpc_distkv.attention import (
    PagedBatch,
    PagedRow,
    Rotation,
    micro_attention,
    rotate_and_write,
)
from hpc_distkv.comm.device import Device
from hpc_distkv.control.messages.requests import LogitRules, Request, Sampling, pack_tokens
from hpc_distkv.decide.sequence import TokenSequence
from hpc_distkv.errors import OptionError
from hpc_distkv.ids import RequestId
from hpc_distkv.memory.pool import BlockPool
from hpc_distkv.model.decoder import Decoder
from hpc_distkv.step.sampler import begin_sampling
from hpc_distkv.step.sizes import LONG_CONTEXT, MOST_SHARED, LargestStep
from hpc_distkv.step.staging import lay_out

LOGPROBS = 20
"""Alternatives per token that a request may ask for."""


def free_memory(device: Device) -> int:
    """Free bytes of the GPU."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device.place)[0]


def activation_peak(model: Decoder, device: Device, step: LargestStep) -> int:
    """Bytes that steps take beyond what is in use when this returns. Raises OptionError if there is
    no room for the largest."""
    config = model.config
    peak = step.exchanged(config, model.dtype.itemsize) + step.tables(config)
    parts: list[Callable[[], None]] = [lambda: rehearse(model, device, step)]
    if step.others:
        parts.append(lambda: serve(model, device, step))
    if step.recorded:
        parts.append(lambda: rehearse(model, device, step.decodes))
    if step.stages:
        parts.append(lambda: stage(model, step))
    try:
        return peak + sum(_measured(device, part) for part in parts)
    except torch.cuda.OutOfMemoryError as error:
        raise OptionError(
            f"the GPU has no room for a step of {step.tokens} tokens beside the weights: give less "
            "--max-num-batched-tokens or --max-num-seqs"
        ) from error


def _measured(device: Device, part: Callable[[], None]) -> int:
    """Bytes that `part` takes at its peak and frees. What it leaves behind (libraries' workspaces)
    counts as in use from then on."""
    torch.cuda.synchronize(device.place)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device.place)
    part()
    torch.cuda.synchronize(device.place)
    peak = torch.cuda.max_memory_reserved(device.place)
    torch.cuda.empty_cache()
    return peak - torch.cuda.memory_reserved(device.place)


@torch.inference_mode()
def rehearse(model: Decoder, device: Device, step: LargestStep) -> None:
    """One step of `step.tokens` tokens: `step.rows` - 1 rows in decode, and a prompt of the rest;
    all rows draw a token, by all rules there are. Waits for no other rank."""
    _step(model.among(model.lanes.rehearsal()), device, step)


@torch.inference_mode()
def serve(model: Decoder, device: Device, step: LargestStep) -> None:
    """Run the attention of a debtor's largest step to guests."""
    with device.serving():
        pool, config = _pool(model, step), model.config
        shape = (step.tokens, config.num_heads, config.head_dim)
        q = torch.empty(shape, dtype=model.dtype, device=model.device)
        batch = PagedBatch.build([*_decodes(model, pool, step), _prompt(pool, step)])
        for spec in model.attention:
            micro_attention(q, *pool.layer(0), batch, spec, causal=False)


@torch.inference_mode()
def stage(model: Decoder, step: LargestStep) -> None:
    """Run attention to staged rBlocks: with all queries of a step, and with fewer and fewer, whose
    keys are split more."""
    config, size = model.config, step.block_size
    sizes = (config.num_kv_heads, size, config.head_dim)
    buffers = lay_out(*sizes, model.dtype, model.device)
    shape = (step.tokens, config.num_heads, config.head_dim)
    q = torch.empty(shape, dtype=model.dtype, device=model.device)
    blocks = range(len(buffers[0].rblocks))
    kv_len = len(blocks) * size
    count = step.tokens
    while count:
        row = PagedRow(count, 0, blocks, range(0, kv_len, size), kv_len)
        batch = PagedBatch.build([row])
        for spec in model.attention:
            micro_attention(q[:count], *buffers[0].cache, batch, spec, causal=False)
        count //= 2


def _step(model: Decoder, device: Device, step: LargestStep) -> None:
    pool = _pool(model, step)
    batch = PagedBatch.build([*_decodes(model, pool, step), _prompt(pool, step)])
    apart = step.shares and not any(spec.positional for spec in model.attention)
    asked = MOST_SHARED * step.tokens if apart else 0
    shared = PagedBatch.build([_prompt(pool, step)._replace(queries=asked)])
    ends = torch.arange(step.rows)
    ends[-1] = step.tokens - 1
    zeros = torch.zeros(step.tokens, dtype=torch.int64)
    places = torch.arange(step.tokens, dtype=torch.int32)
    slots = places // step.block_size % pool.num_blocks
    rows = places.repeat(MOST_SHARED if apart else 0)
    ids, ends, slots, offsets, rows = device.upload(
        [zeros, ends, slots, places % step.block_size, rows]
    )

    def attend(
        layer: int, qk: torch.Tensor, v: torch.Tensor, rotation: Rotation | None
    ) -> torch.Tensor:
        cache, spec = pool.layer(0), model.attention[layer]
        q = rotate_and_write(qk, v, rotation, *cache, slots, offsets)
        out, _ = micro_attention(q, *cache, batch, spec, causal=True)
        if apart:
            micro_attention(q.index_select(0, rows), *cache, shared, spec, causal=False)
        return out

    lengths = ids if model.needs_lengths else None
    logits = model.logits(model.hidden(ids, ids, attend, lengths=lengths)[ends])
    draw = begin_sampling(device, logits, [_sequence(logits.shape[1])] * step.rows)
    while draw.ready() is None:
        pass


def _sequence(vocab: int) -> TokenSequence:
    """A row of LONG_CONTEXT different tokens with every sampling rule."""
    rules = LogitRules(1.1, 0.1, 0.1, ((0, 1.0),), (0,), 0.01)
    most = LONG_CONTEXT + 1
    sampling = Sampling(
        most, 1.0, top_p=0.9, min_tokens=most, logprobs=min(LOGPROBS, vocab), rules=rules
    )
    tokens = pack_tokens(range(min(LONG_CONTEXT, vocab)))
    return TokenSequence(Request(RequestId(0), tokens, sampling, tokens), 0.0)


def _pool(model: Decoder, step: LargestStep) -> BlockPool:
    """One layer of a prompt's rBlocks."""
    config, size = model.config, step.block_size
    blocks = -(-(step.tokens - step.rows + 1) // size)
    shape = (blocks, 1, config.num_kv_heads, size, config.head_dim)
    return BlockPool(*shape, model.dtype, model.device)


def _decodes(model: Decoder, pool: BlockPool, step: LargestStep) -> list[PagedRow]:
    """All rows but one, each with a long context that repeats few rBlocks."""
    context, size = min(model.config.max_position, LONG_CONTEXT), step.block_size
    listed = [block % pool.num_blocks for block in range(-(-context // size))]
    row = PagedRow(1, context - 1, listed, range(0, context, size), context)
    return [row] * (step.rows - 1)


def _prompt(pool: BlockPool, step: LargestStep) -> PagedRow:
    prompt, size = step.tokens - step.rows + 1, step.block_size
    return PagedRow(prompt, 0, range(pool.num_blocks), range(0, prompt, size), prompt)
