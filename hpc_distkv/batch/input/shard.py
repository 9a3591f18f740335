"""A part of a batch file that a run of its own answers."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """Shard `index` of `count`, counted from 1. Rows are dealt out by their custom_id, so a row
    stays in its shard when others are added, and rows with the same one are in the same shard."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """ "i/n" → shard. Raises ValueError."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(
                f"'{text}' is no shard: write i/n with i from 1 to n, as in --shard 1/8 to "
                "--shard 8/8 (#SBATCH --array=1-8, --shard $SLURM_ARRAY_TASK_ID/8)"
            )
        return cls(int(match[1]), int(match[2]))

    def has(self, custom_id: str | None, number: int) -> bool:
        """Whether a row belongs to it."""
        return self.dealt(custom_id, number, self.count) == self.index

    @staticmethod
    def dealt(custom_id: str | None, number: int, count: int) -> int:
        """The index of the shard, of `count`, that a row belongs to. One without a custom_id is
        dealt by its number."""
        name = str(number) if custom_id is None else custom_id
        return 1 + zlib.crc32(name.encode(errors="surrogatepass")) % count

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"
