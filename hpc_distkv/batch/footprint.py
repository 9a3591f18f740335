"""How much KV memory a row takes, and how many ranks that is."""

from __future__ import annotations

from typing import NamedTuple

from hpc_distkv.batch.input.rows import Row
from hpc_distkv.control.assign.work import kv_tokens


class Pool(NamedTuple):
    """The KV cache of one rank."""

    block_size: int
    """Tokens per rBlock."""
    num_blocks: int | None
    """None: not known."""

    @property
    def tokens(self) -> int | None:
        """That it holds."""
        return None if self.num_blocks is None else self.num_blocks * self.block_size


class Footprint(NamedTuple):
    """What each answer of a row comes to need."""

    prompt: int
    """Tokens."""
    output: int | None
    """Tokens at most; None: the row sets no limit, and `blocks` and `ranks` are of its prompt."""
    blocks: int
    """rBlocks."""
    ranks: int | None
    """Whose pools hold them; None: not known how much one holds."""

    @classmethod
    def of(cls, row: Row, pool: Pool) -> Footprint:
        """The footprint of a row in such pools."""
        output = None if row.open_ended else row.sampling.max_tokens
        blocks = -(-kv_tokens(len(row.prompt), output or 1) // pool.block_size)
        ranks = -(-blocks // pool.num_blocks) if pool.num_blocks else None
        return cls(len(row.prompt), output, blocks, ranks)

    def cells(self) -> tuple[str, ...]:
        """Prompt, output, rBlocks and ranks as words; "+" where there may come more."""
        more = "+" if self.output is None else ""
        return (
            str(self.prompt),
            "open" if self.output is None else str(self.output),
            f"{self.blocks}{more}",
            "?" if self.ranks is None else f"{self.ranks}{more}",
        )
