"""The records that travel between instances and the gManager, and between loan partners.

They are frozen msgspec structs: compact on the wire and checked when they are decoded, so a
malformed message is refused rather than obeyed. (`Counters` alone is mutable: an instance keeps
one and its reports carry what it holds then.) Blocks are counted in rBlocks, times are in
seconds, token ids travel as little-endian int32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import msgspec
import numpy as np

NOT_FINITE = "not_finite"
"""The `finish_reason` of a request for which the model computed logits that are no numbers."""
NOBODY = 2**62
"""Younger than any request."""


def pack_tokens(tokens: Iterable[int]) -> bytes:
    """Token ids → bytes."""
    return np.fromiter(tokens, dtype="<i4").tobytes()


def unpack_tokens(packed: bytes) -> list[int]:
    """Bytes of `pack_tokens` → token ids."""
    tokens: list[int] = np.frombuffer(packed, dtype="<i4").tolist()
    return tokens


class LogitRules(msgspec.Struct, frozen=True, array_like=True):
    """What decides on a token beside temperature, top-k and top-p; most requests have none."""

    repetition_penalty: float = 1.0
    """Of tokens in prompt or output: positive logits are divided by it, others multiplied."""
    frequency_penalty: float = 0.0
    """Subtracted for every time that the output has the token."""
    presence_penalty: float = 0.0
    """Subtracted once if the output has the token."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit)."""
    withheld: tuple[int, ...] = ()
    """Token ids that cannot be drawn before the output has `min_tokens`."""
    min_p: float = 0.0
    """Tokens less probable than this part of the most probable one are not drawn."""

    @property
    def penalises(self) -> bool:
        """Whether the tokens so far matter."""
        penalties = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        return penalties != (1.0, 0.0, 0.0)


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How the tokens of one request are drawn, and when it ends."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    """The request ends with any of these."""
    min_tokens: int = 0
    """Output tokens before anything but `max_tokens` may end the request."""
    stop: tuple[str, ...] = ()
    """The request ends when its text has any of these."""
    include_stop: bool = False
    """Whether what ended the request, a stop token or string, is part of the output."""
    skip_special_tokens: bool = True
    """Whether the text leaves special tokens out."""
    logprobs: int | None = None
    """Most probable tokens to report beside each token; None: report no log-probabilities."""
    rules: LogitRules | None = None


class Request(msgspec.Struct, frozen=True, array_like=True):
    """One row to be answered. `id` is its place in the global order: lower is older."""

    id: int
    prompt: bytes
    """`pack_tokens` of the prompt; never empty."""
    sampling: Sampling
    output: bytes = b""
    """`pack_tokens` of the output that an earlier run has made."""
    logprobs: bytes = b""
    """`control.logprobs` of `output`, if the request asks for them."""

    @property
    def prompt_len(self) -> int:
        """Prompt tokens."""
        return len(self.prompt) // 4

    def prefix_keys(self, ends: Iterable[int], salt: bytes = b"") -> list[bytes]:
        """For each of `ends`, ascending: a key of the first `end` tokens, unique to them and the
        salt. Ends of which it is known that nobody shares them may be left out, with all beyond."""
        digest, begin = hashlib.blake2b(salt, digest_size=16), 0
        keys = []
        for end in ends:
            digest.update(memoryview(self.prompt)[4 * begin : 4 * end])
            keys.append(digest.copy().digest())
            begin = end
        return keys

    @property
    def length(self) -> int:
        """Tokens of the prompt and of an earlier run."""
        return self.prompt_len + len(self.output) // 4


class Result(msgspec.Struct, frozen=True, array_like=True):
    """What became of one request."""

    id: int
    tokens: bytes
    """`pack_tokens` of the output, without the stop token unless the request includes it."""
    finish_reason: str
    """"stop", "length" or NOT_FINITE."""
    first_token_time: float
    """Seconds from assignment to the first token."""
    total_time: float
    """Seconds from assignment to the last token."""
    logprobs: bytes = b""
    """`control.logprobs` of the output's tokens, if the request asked for them."""
    text_end: int | None = None
    """Characters of the output's text that belong to the answer, if a stop string ended it."""


class Unfinished(msgspec.Struct, frozen=True, array_like=True):
    """A request that a run was stopped before it could finish."""

    id: int
    output: bytes
    """`pack_tokens` of its output so far; never empty."""
    logprobs: bytes = b""
    """`control.logprobs` of `output`, if the request asks for them."""


class Counters(msgspec.Struct):
    """What one instance has done since its start. Times are wall seconds of its first rank, bytes
    are those of that rank alone."""

    steps: int = 0
    prompt_tokens: int = 0
    """Prompt tokens computed, recomputed ones included."""
    cached_tokens: int = 0
    """Tokens of rows that began with rBlocks of others, or of their own before they gave way: they
    were not computed again."""
    generated_tokens: int = 0
    preemptions: int = 0
    stalls: int = 0
    """Times a row could not take part in a step for want of an rBlock."""
    refused_grants: int = 0
    blocks_lent: int = 0
    """rBlocks received from debtors, copies included."""
    blocks_borrowed: int = 0
    """rBlocks moved to creditors."""
    blocks_returned: int = 0
    """rBlocks brought home from creditors."""
    blocks_copied: int = 0
    """rBlocks copied to the instance that a request migrates to."""
    migrations: int = 0
    """Requests handed over to another instance."""
    peak_borrowed: int = 0
    """Most rBlocks hosted elsewhere at once."""
    blocks_to_host: int = 0
    """rBlocks moved or copied to the host's memory."""
    blocks_from_host: int = 0
    """rBlocks brought home from there."""
    peak_host: int = 0
    """Most rBlocks there at once."""
    held_block_steps: int = 0
    """rBlocks of running requests, summed over steps."""
    remote_block_steps: int = 0
    """Those of them that were hosted elsewhere."""
    bytes_moved: int = 0
    bytes_queried: int = 0
    """Query vectors sent and partial results returned."""
    bytes_reported: int = 0
    """Reports sent to the gManager and answers received."""
    step_time: float = 0.0
    """Of steps, whatever they were spent on."""
    compute_time: float = 0.0
    """Of steps, less the following. This and the following, to `other_time`, exclude each other:
    together they are all the time of the run."""
    partial_wait: float = 0.0
    """Waiting for partial results from creditors."""
    move_wait: float = 0.0
    """Waiting for rBlocks."""
    host_time: float = 0.0
    """Attending to own rBlocks in the host's memory."""
    serve_time: float = 0.0
    """Attending debtors' queries to their guests."""
    query_wait: float = 0.0
    """Without work: waiting for the queries of a debtor's step under way here."""
    control_wait: float = 0.0
    """Without work: waiting for answers of control rounds."""
    lead_time: float = 0.0
    """Rank 0: the gManager's rounds, with reading rows and writing answers."""
    other_time: float = 0.0
    prediction_error: float = 0.0
    """Mean error of predicted decode step times, relative to the measured ones."""
    gaps: dict[int, int] = {}
    """Times between two tokens of a row: bin of `control.gaps` → count."""


class Remains(msgspec.Struct, frozen=True, array_like=True):
    """What an instance has when a run is over: its counters, and what was not reported."""

    counters: Counters
    results: list[Result]
    unfinished: list[Unfinished]


class Handover(msgspec.Struct, frozen=True, array_like=True):
    """A request that goes on at another instance. Ages are seconds before the header."""

    request: Request
    tokens: bytes
    """`pack_tokens` of prompt and output so far."""
    computed: int
    assigned_age: float
    first_token_age: float | None
    last_token_age: float | None
    logprobs: bytes = b""
    """`control.logprobs` of the output so far."""


class Header(msgspec.Struct, frozen=True, array_like=True, tag="header"):
    """A debtor to a creditor before layer 0 of a step of the debtor, if there is anything to tell.
    Applied in this field order."""

    splits: list[tuple[int, int, int]]
    """(prefix, logical index, new prefix) of mine: the guest's rBlocks before that index are the
    new prefix's."""
    released: list[int]
    """Requests and prefixes of mine that ended: free their guests."""
    dropped: list[tuple[int, int]]
    """(request, logical index) of mine that go on: free their guests' rBlocks before that index."""
    returned: int
    """Credit of mine that I give back."""
    moves: list[tuple[int, int]]
    """(request or prefix, logical index) of the rBlocks I send you behind this step's layers."""
    recalls: list[tuple[int, int]]
    """(request or prefix, logical index) of my rBlocks with you: send them back behind this step's
    layers."""
    handovers: list[Handover]
    """Requests of mine of which you host all rBlocks after this step: they are yours from then."""
    queries: list[tuple[list[int], int, int]]
    """(request or prefixes, query rows, position of the first) of mine that attend to these guests
    with you, in order of the rows."""


class Credit(msgspec.Struct, frozen=True, array_like=True, tag="credit"):
    """A creditor to a debtor."""

    blocks: int
    """rBlocks that I set aside for you."""


class Large(msgspec.Struct, frozen=True, array_like=True):
    """What may come of a row that is too large for one pool."""

    request: int
    begun: bool
    """Whether it runs, or may begin as soon as there is room for its first tokens."""
    held: int
    """rBlocks that it has."""
    blocks: int
    """rBlocks that it is expected to have at its end."""
    prompt: float
    """Work of its prompt that is left (`control.work`)."""
    output: float
    """Output tokens that are expected to be left."""


class Changes(msgspec.Struct, frozen=True, array_like=True):
    """The part of a report that most reports do without."""

    lent: dict[int, int] | None = None
    """Debtor → rBlocks lent or set aside; None: as reported last."""
    results: list[Result] = []
    adopted: list[int] = []
    """Requests of other instances that were handed over to this one."""
    counters: Counters | None = None
    returned: list[Request] = []
    """Rows that were not begun and go to another instance."""
    large: list[Large] = []
    """Rows too large for this instance: all that run, and the oldest that wait."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One instance to the gManager at a round boundary. All but `changes` is a row of numbers
    (`control.wire`)."""

    round: int
    capacity: int
    """rBlocks in the pool."""
    free: int
    promised: int
    """rBlocks set aside until the answer: the most that may be granted."""
    hosted: int = 0
    """rBlocks that hold KV of others."""
    wanted: int = 0
    """rBlocks to borrow."""
    wanted_for: int = NOBODY
    """The oldest request that wants them; NOBODY when nothing is wanted."""
    largest: int = 0
    """rBlocks that the largest request that wants any may come to need in all."""
    starved: bool = False
    """`wanted_for` cannot go on, and no younger request at home could give way."""
    room_rows: int = 0
    """Rows that may be assigned now."""
    room_tokens: int = 0
    """Prompt tokens after which no further row should be assigned."""
    running: int = 0
    """Rows that have rBlocks."""
    waiting: int = 0
    """Rows that were not begun and could begin there."""
    seats: int = 0
    """Further rows that may run, if there is memory."""
    youngest: int = -1
    """The youngest running request; -1: none runs."""
    youngest_blocks: int = 0
    longest: int = 0
    """Sealed rBlocks at home of the request that has most of them."""
    lacking: int = 0
    """rBlocks that the oldest waiting row lacks to begin beside those that run; 0 if none does."""
    prompt_tokens: int = 0
    """Prompt tokens computed so far, recomputed ones included."""
    generated_tokens: int = 0
    """Output tokens so far."""
    kv_tokens: int = 0
    """KV tokens attended to here in a step of decodes: own ones at home, and guests."""
    work_left: float = 0.0
    """Predicted work of all rows that run or wait here (`control.work`)."""
    row_blocks: float = 0.0
    """rBlocks that a row here comes to need in the mean; 0 if unknown."""
    fixed: float = 0.0
    """Fitted seconds of a decode step, whatever its rows."""
    per_token: float = 0.0
    """Fitted seconds of a decode step per row."""
    per_kv: float = 0.0
    """Fitted seconds of a decode step per KV token."""
    prompt_time: float = 0.0
    """Measured seconds to compute a prompt token; 0 if there were none yet."""
    exchange: float = 0.0
    """Measured seconds that remote rBlocks add to a decode step; 0 if there were none yet."""
    drain: bool = False
    """The run should end soon."""
    halt: bool = False
    """The run should end now."""
    changes: Changes = Changes()


class Answer(msgspec.Struct, omit_defaults=True):
    """The gManager to one instance, in force from its next boundary. Mutable while it is made."""

    round: int
    assign: list[Request] = []
    give_back: int = 0
    """Rows that were not begun to return, the youngest first."""
    lend: dict[int, int] = {}
    """Debtor → rBlocks of the promise to set aside for it."""
    granted: int = 0
    """rBlocks of the wish that were granted: credit that their creditors will open by mail."""
    shed: dict[int, int] = {}
    """Creditor → rBlocks of the longest requests to move there as credit is opened."""
    recall: dict[int, int] = {}
    """Creditor → rBlocks to bring home."""
    keep: int = 0
    """rBlocks to leave free for loans to come: admit nothing into them."""
    begin: list[int] = []
    """Rows too large for the instance that may begin with what there is, and borrow."""
    admit_before: int = NOBODY
    """No request younger than this may be admitted; NOBODY: all may."""
    give_way: int = 0
    """rBlocks that requests younger than `admit_before` have to free."""
    give_way_at: int = -1
    """Where; -1: anywhere."""
    drain: bool = False
    """Begin nothing any more: the run ends before all rows are answered."""
    stop: bool = False
    """The run is over, whatever still runs."""
