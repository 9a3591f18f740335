"""The bytes of the rBlocks of one rank."""

from __future__ import annotations

import torch


class BlockPool:
    """One tensor `[num_blocks, layers, 2, kv_heads, block_size, head_dim]`: an rBlock's keys (0)
    and values (1) of all layers are contiguous, so it is sent as one message, and within a layer
    and head its tokens are contiguous, so kernels read it in place.

    Memory is reserved here and touched when it is first written.
    """

    def __init__(
        self,
        num_blocks: int,
        layers: int,
        kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        memory: torch.Tensor | None = None,
    ) -> None:
        """`memory`: as many bytes as the rBlocks take, to be used for them; None: a new tensor on
        `device`."""
        self.block_size = block_size
        shape = (num_blocks, layers, 2, kv_heads, block_size, head_dim)
        if memory is None:
            self._kv = torch.empty(shape, dtype=dtype, device=device)
        else:
            self._kv = memory.view(dtype).view(shape)
        self._layers = [(self._kv[:, layer, 0], self._kv[:, layer, 1]) for layer in range(layers)]

    @property
    def num_blocks(self) -> int:
        """rBlocks in the pool."""
        return self._kv.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self._kv.dtype

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._kv.device

    @property
    def layers(self) -> int:
        """Layers of the model shard."""
        return len(self._layers)

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer: views `[num_blocks, kv_heads, block_size, head_dim]`."""
        return self._layers[layer]

    def rblock(self, slot: int) -> torch.Tensor:
        """All bytes of one rBlock, contiguous."""
        return self._kv[slot]
