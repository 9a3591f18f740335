"""Sizes in which rBlocks in the host's memory are attended to. No torch here."""

PIECE_BLOCKS = 64
"""rBlocks of one layer that are copied, each by a call of its own, and attended to at once: 8 MiB
with the heads of Llama 3 8B and rBlocks of 32 tokens. An estimate: not measured."""
BUFFERS = 2
"""Pieces on the device at once: it attends to one while the next one comes."""
QUERY_ROWS = 16
"""That the host's processor is measured with: about as many as where copies begin to pay, by
arithmetic. One alone costs more, for it is bound by memory, and is seldom worth a copy anyway."""
