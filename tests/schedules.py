"""A scheduler without an engine."""

from __future__ import annotations

from hpc_distkv.control.messages.counters import Counters
from hpc_distkv.control.messages.reports import Answer
from hpc_distkv.control.messages.requests import Request, Sampling, pack_tokens
from hpc_distkv.control.policy import POLICIES
from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.decide.scheduler import Scheduler
from hpc_distkv.decide.sequence import TokenSequence
from hpc_distkv.memory.rmanager import RManager

BLOCK = 4


def make(num_blocks: int = 100, policy: str = "queue", **limits: int) -> Scheduler:
    sizes = {"block_size": BLOCK, "max_num_seqs": 8, "max_num_batched_tokens": 16} | limits
    config = EngineConfig(num_blocks, policy=POLICIES[policy], **sizes)
    return Scheduler(RManager(0, num_blocks), config, Counters())


def expect_short(scheduler: Scheduler) -> None:
    """Let the scheduler have seen only outputs far shorter than their limits: it will begin rows
    that outgrow memory together."""
    scheduler.foresight.outputs.add(1, 1000)


def add(scheduler: Scheduler, number: int, prompt: int, max_tokens: int = 8) -> TokenSequence:
    request = Request(number, pack_tokens(range(prompt)), Sampling(max_tokens=max_tokens))
    sequence = TokenSequence(request, assigned_at=0.0)
    scheduler.add(sequence)
    return sequence


def step(scheduler: Scheduler) -> dict[int, int]:
    """One step as the worker does it, with token 0 sampled; request → tokens computed."""
    plan = scheduler.plan()
    scheduler.rm.check()
    scheduler.rm.borrower.commit(plan.moves, plan.recalls)
    for sequence, tokens in plan.scheduled:
        assert 0 < tokens <= sequence.remaining
        sequence.computed += tokens
        room = scheduler.rm.tables[sequence.id].blocks * scheduler.config.block_size
        assert sequence.computed <= room, "a token has no rBlock"
        if not sequence.remaining:
            sequence.expect(0)
            sequence.learn(0, 0.0)
            if sequence.finish_reason():
                scheduler.finish(sequence)
    scheduler.rm.check()
    return {sequence.id: tokens for sequence, tokens in plan.scheduled}


def answer(scheduler: Scheduler, asked: int = 0, **fields: object) -> None:
    scheduler.apply(Answer(round=0, **fields), asked)


def running(scheduler: Scheduler) -> list[int]:
    return [sequence.id for sequence in scheduler.running]
