"""What a step takes of a GPU's memory beside weights and pool: measured, not estimated."""

from __future__ import annotations

import torch

from hpc_distkv.attention import (
    PagedBatch,
    PagedRow,
    Rotation,
    micro_attention,
    rotate_and_write,
)
from hpc_distkv.comm.device import Device
from hpc_distkv.control.messages import Request, Sampling, pack_tokens
from hpc_distkv.engine.batch_sampler import sample_together
from hpc_distkv.engine.config import OptionError
from hpc_distkv.engine.sequence import Sequence
from hpc_distkv.memory.pool import BlockPool
from hpc_distkv.model.decoder import Decoder
from hpc_distkv.model.shard import Alone

LONG_CONTEXT = 8192
"""Tokens that decoding rows attend to in the step that is measured: enough for their attention to
be split over the whole device, beyond which it takes no more."""


def free_memory(device: Device) -> int:
    """Bytes that the GPU can still give."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device.place)[0]


@torch.inference_mode()
def activation_peak(model: Decoder, device: Device, tokens: int, rows: int, block_size: int) -> int:
    """Bytes that the largest step takes: `tokens` tokens, of which `rows` - 1 are rows in decode
    and the others a prompt; all rows draw a token. Raises OptionError if there is no room for it.
    """
    lanes, model.lanes = model.lanes, Alone()  # Others measure at times of their own.
    torch.cuda.synchronize(device.place)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device.place)
    torch.cuda.reset_peak_memory_stats(device.place)
    try:
        _step(model, device, tokens, rows, block_size)
        torch.cuda.synchronize(device.place)
    except torch.cuda.OutOfMemoryError as error:
        raise OptionError(
            f"the GPU has no room for a step of {tokens} tokens beside the weights: give less "
            "--max-num-batched-tokens or --max-num-seqs"
        ) from error
    finally:
        model.lanes = lanes
    peak = torch.cuda.max_memory_reserved(device.place) - before
    torch.cuda.empty_cache()
    return peak


def _step(model: Decoder, device: Device, tokens: int, rows: int, block_size: int) -> None:
    config = model.config
    prompt = tokens - rows + 1
    context = min(config.max_position, LONG_CONTEXT)
    pool = BlockPool(
        -(-prompt // block_size),
        1,
        config.num_kv_heads,
        block_size,
        config.head_dim,
        model.dtype,
        model.device,
    )
    blocks = -(-context // block_size)
    listed = [block % pool.num_blocks for block in range(blocks)]
    decode = PagedRow(1, context - 1, listed, range(0, context, block_size), context)
    chunk = PagedRow(prompt, 0, range(pool.num_blocks), range(0, prompt, block_size), prompt)
    batch = PagedBatch.build([decode] * (rows - 1) + [chunk])
    ends = torch.arange(rows)
    ends[-1] = tokens - 1
    zeros = torch.zeros(tokens, dtype=torch.int64)
    places = torch.arange(tokens, dtype=torch.int32)
    ids, ends, slots, offsets = device.upload(
        [zeros, ends, places // block_size % pool.num_blocks, places % block_size]
    )

    def attend(
        layer: int, qk: torch.Tensor, v: torch.Tensor, rotation: Rotation | None
    ) -> torch.Tensor:
        cache = pool.layer(0)
        q = rotate_and_write(qk, v, rotation, *cache, slots, offsets)
        return micro_attention(q, *cache, batch, model.attention[layer], causal=True)[0]

    lengths = ids if model.needs_lengths else None
    logits = model.logits(model.hidden(ids, ids, attend, lengths=lengths)[ends])
    drawn = Sampling(max_tokens=1, temperature=1.0, top_p=0.9)
    sequence = Sequence(Request(0, pack_tokens([0]), drawn), 0.0)
    sample_together(device, logits, [sequence] * rows)
