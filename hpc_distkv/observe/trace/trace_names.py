"""What is what in a trace file: the words of its writer and its readers."""

from __future__ import annotations

from hpc_distkv.step.timesheet import Kind

NAMES = {
    Kind.STEP: "step",
    Kind.PARTIALS: "wait for partial results",
    Kind.MOVES: "wait for rBlocks",
    Kind.SERVE: "serve guests",
    Kind.QUERIES: "wait for queries",
    Kind.CONTROL: "wait for answer",
    Kind.LEAD: "gManager",
    Kind.HOST: "attend in the host's memory",
    Kind.LAYER: "layer",
    Kind.EXCHANGE: "exchange",
    Kind.TRANSFER: "rBlocks under way",
    Kind.VISIT: "step of a debtor",
    Kind.ROUND: "control round",
}
DETAILS = {
    Kind.STEP: ("rows", "tokens"),
    Kind.PARTIALS: ("layer", "creditors"),
    Kind.MOVES: ("rBlocks",),
    Kind.SERVE: ("debtor", "layer"),
    Kind.CONTROL: ("round",),
    Kind.LEAD: ("reports",),
    Kind.HOST: ("layer",),
    Kind.LAYER: ("layer",),
    Kind.EXCHANGE: ("layer", "creditors"),
    Kind.TRANSFER: ("rBlocks",),
    Kind.VISIT: ("debtor", "query rows"),
    Kind.ROUND: ("round",),
}
"""Kind → what the two numbers of its spans are."""
FIRST_PROCESS = 1
"""Process id of rank 0: Perfetto takes 0 for the idle process of Linux."""
WORK = 1
TRACKS = {
    WORK: "work",
    Kind.EXCHANGE: "exchange",
    Kind.TRANSFER: "moves",
    Kind.ROUND: "control rounds",
}
"""Thread id → name. Spans of one thread are nested or apart, as the format asks for."""
DEBTOR_STEPS = 100
"""Thread id of the steps of debtor 0; those of the others follow."""

POOL, ROWS, TOKENS, OWES = "KV pool (rBlocks)", "rows", "tokens", "owes (rBlocks)"
"""Counters. A process is a rank; those of an instance are its first rank's."""
FREE, OWN, HOSTED = "free", "own", "hosted"
