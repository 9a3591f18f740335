"""Whether a rank's memory is enough for what it needs. No torch here."""

from __future__ import annotations

from typing import NamedTuple

from hpc_distkv.errors import OptionError
from hpc_distkv.start.memory_limits import Room
from hpc_distkv.start.needs import Memory
from hpc_distkv.start.options import EngineOptions
from hpc_distkv.units import size

GIVEN_SHARE = 0.9
"""Part of what a rank has left beside all else that its pool takes unless told otherwise, where
memory was given to the job: the rest is for what was counted too low."""
FOUND_SHARE = 0.4
"""The same on a machine that others may be using too."""


class Budget(NamedTuple):
    """What a rank on a CPU needs, and what it may have."""

    memory: Memory
    """But for the pool."""
    room: Room

    @property
    def taken(self) -> int:
        """Bytes of weights and program: what is resident, or will be."""
        return max(self.room.resident, self.memory.weights + self.memory.program)

    @property
    def rest(self) -> int:
        """Bytes that there are for a pool."""
        others = self.memory.steps + self.memory.host + self.memory.input
        return max(0, self.room.most - self.taken - others)

    def pool(self, wanted: int | None, block_bytes: int) -> int:
        """Bytes of the pool: as many as are `wanted`, or a share of what there is. Raises
        OptionError, with the sum, if there is no room for them, or for one rBlock."""
        if wanted is None:
            share = GIVEN_SHARE if self.room.given else FOUND_SHARE
            wanted = max(block_bytes, int(share * self.rest))
        if wanted > self.rest:
            raise OptionError(self._refusal(wanted, block_bytes))
        return wanted

    def _refusal(self, wanted: int, block_bytes: int) -> str:
        program = self.taken - self.memory.weights
        needed = self.memory._replace(kv=wanted, program=program)
        limit, sharing = self.room.limit, self.room.sharing
        ranks = f"each of {sharing} ranks" if sharing > 1 else "it"
        if self.rest >= block_bytes:
            advice = (
                f"give --kv-memory {self.rest >> 20}MiB or --num-blocks {self.rest // block_bytes} "
                "at most, or the job more memory"
            )
        else:
            advice = (
                "give the job more memory (--mem of sbatch), a node fewer ranks, a replica more "
                "(--tensor-parallel-size), or less --max-num-batched-tokens, --max-num-seqs or "
                "--host-kv-memory"
            )
        return (
            f"a rank needs {needed.words()}, but {limit.name} has {size(limit.most)}, which leaves "
            f"{ranks} {size(self.room.most)}: {advice}"
        )


def wanted_bytes(options: EngineOptions, block_bytes: int) -> int | None:
    """Of the pool of a rank, if it is given. Raises OptionError if they hold no rBlock."""
    wanted = options.num_blocks * block_bytes if options.num_blocks else options.kv_memory
    if wanted is not None and wanted < block_bytes:
        raise OptionError(
            f"one rBlock takes {block_bytes} bytes, but there are {wanted} bytes for the KV "
            "cache: give more --kv-memory or a smaller --block-size"
        )
    return wanted
