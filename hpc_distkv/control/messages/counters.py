"""What an instance counts."""

from __future__ import annotations

import msgspec


class Counters(msgspec.Struct):
    """What one instance has done since its start; mutable: an instance keeps one, and its reports
    carry what it holds then. Times are wall seconds of its first rank, bytes are those of that rank
    alone."""

    steps: int = 0
    prompt_tokens: int = 0
    """Prompt tokens computed, recomputed ones included."""
    cached_tokens: int = 0
    """Tokens that were not computed again: of requests that began with rBlocks of others, or with
    their own of before they were preempted."""
    generated_tokens: int = 0
    preemptions: int = 0
    stalls: int = 0
    """Times a request could not take part in a step for want of an rBlock."""
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
    """Times between two tokens of a request: bin of `control.messages.percentiles` → count."""
