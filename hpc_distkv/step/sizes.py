"""Sizes of steps that are known beforehand. No torch here, so that a job can be sized on a login
node."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hpc_distkv.model.config import ModelConfig

LONG_CONTEXT = 8192
"""Tokens that decoding rows attend to in the step that is measured on a GPU, and different ones
that each of them has had: enough for their attention to be split over the whole device, beyond
which it takes no more."""
PROMPTS = 8
"""Other instances that a prompt's queries are sent to, or come from, in one step."""
MOST_SHARED = 3
"""Groups that a row may be in at once, those that spare most: a system prompt, a document, and a
prompt's several answers. It bounds the memory of a step."""
FLOAT = 4
"""Bytes of a float32: on CPUs kernels for half precision work in it inside."""
LOGITS = 4
"""Copies of a row's logits in float32 on a CPU: what the head gives, the same in float32, those of
rows that ask for log-probabilities, and these."""
ROW_DRAWN = 48
"""Bytes of each token of the vocabulary while a CPU draws one row's next token."""

PIECE_BLOCKS = 64
"""rBlocks of one layer that are copied, each by a call of its own, and attended to at once: 8 MiB
with the heads of Llama 3 8B and rBlocks of 32 tokens. An estimate: not measured."""
BUFFERS = 2
"""Pieces on the device at once: it attends to one while the next one comes."""
QUERY_ROWS = 16
"""That the host's processor is measured with: about as many as where copies begin to pay, by
arithmetic. One alone costs more, for it is bound by memory, and is seldom worth a copy anyway."""


@dataclass(frozen=True)
class LargestStep:
    """The most that one step of a rank may compute."""

    tokens: int
    rows: int
    """At most `tokens`."""
    block_size: int
    others: int = 0
    """Instances to lend to and borrow from."""
    shares: bool = False
    """Whether rows may share rBlocks."""
    recorded: bool = False
    """Whether decode steps are recorded."""
    stages: bool = False
    """Whether rBlocks of the host's memory may be attended to here."""

    @property
    def decodes(self) -> LargestStep:
        """The same without prompts."""
        return replace(self, tokens=self.rows, shares=False)

    def exchanged(self, config: ModelConfig, itemsize: int) -> int:
        """Bytes of all queries and partial results of a layer, as a debtor and as a creditor, for
        the heads of `config` and values of `itemsize` bytes."""
        heads, dim = config.num_heads, config.head_dim
        number = 4  # of a row's place in its step
        row = heads * (dim * (itemsize + FLOAT) + FLOAT) + number
        prompts = min(self.others, PROMPTS)
        return 2 * row * (prompts * self.tokens + (self.others - prompts) * self.rows)

    def tables(self, config: ModelConfig) -> int:
        """Bytes of the lists of rBlocks of rows as long as the model allows, likewise."""
        beyond = max(0, config.max_position - LONG_CONTEXT)
        lists = 2 * 4 * self.rows * -(-beyond // self.block_size)
        return lists * (1 + bool(self.others))

    def computed_on_cpu(self, config: ModelConfig) -> int:
        """Most bytes of tensors on a CPU from a step's tokens to the next ones, for the shard that
        `config` is of and the whole vocabulary: its first rank draws for all."""
        hidden, wide, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        # normed and added; q, k and v; normed and turned; the result, and the same in another dtype
        attention = 2 * hidden + (query + 2 * key) + 2 * (query + key) + 2 * query
        if self.shares:
            attention += MOST_SHARED * (2 * query + config.num_heads)
        # normed and added; both halves, the activation, and their product; per expert
        mlp = 2 * hidden + max(1, config.experts_per_token) * (3 * wide + 2 * hidden)
        layers = self.tokens * max(attention, mlp)
        logits = self.rows * (2 * hidden + LOGITS * vocabulary)
        if config.logit_softcap:
            logits += self.rows * vocabulary
        kept = 2 * self.tokens * hidden
        return FLOAT * (kept + max(layers, logits)) + ROW_DRAWN * vocabulary
