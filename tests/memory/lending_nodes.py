"""Instances without a model: their bookkeeping, their bytes and their traffic, in one thread."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from types import SimpleNamespace

import torch

from hpc_distkv.attention import AttentionSpec
from hpc_distkv.comm.transport import Comm
from hpc_distkv.control.messages.reports import Answer
from hpc_distkv.control.messages.requests import Request, Sampling, pack_tokens
from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.decide.instance import Instance
from hpc_distkv.decide.plan import Plan, Scheduled
from hpc_distkv.decide.sequence import TokenSequence
from hpc_distkv.memory.loan import Move
from hpc_distkv.memory.pool import BlockPool
from hpc_distkv.ranks.mail import Log, Mailbox
from hpc_distkv.step.creditor import Creditor
from hpc_distkv.step.debtor import Debtor
from hpc_distkv.step.model import QueryHeads
from hpc_distkv.step.parts import Parts
from hpc_distkv.step.timesheet import Recorder, TimeSheet

BLOCK, LAYERS, HEAD_DIM = 4, 2, 16

Marks = dict[tuple[int, int], float]
"""(request, logical index) → what an rBlock's values are set to, so that a mixed-up one is seen.
Its keys are 0: so attention to some rBlocks is the mean of their marks."""


class Node:
    """One instance that makes random, but legal use of its rBlocks."""

    def __init__(self, comm: Comm, config: EngineConfig, marks: Marks, nodes: list[Node]) -> None:
        """`nodes`: those of all instances, by number."""
        self.number, self.nodes = comm.world.rank, nodes
        self.instance = Instance(self.number, config)
        self.rm = self.instance.rm
        self.pool = BlockPool(config.num_blocks, LAYERS, 1, BLOCK, HEAD_DIM, torch.float32)
        model = SimpleNamespace(attention=[AttentionSpec(1.0)] * LAYERS)
        time = TimeSheet(Recorder())
        parts = Parts(
            comm=comm,
            model=model,
            pool=self.pool,
            config=config,
            heads=QueryHeads(1, HEAD_DIM),
            time=time,
        )
        self.debtor, self.creditor = Debtor(parts, self.instance), Creditor(parts, self.instance)
        self.mailbox = Mailbox(comm, self.instance, self.creditor, Log(comm))
        self.marks = marks
        self.answer: Answer | None = Answer(round=0)
        """Of the last round, until it takes effect."""
        self.plan: Plan | None = None
        """The step under way."""
        self.recall: dict[int, int] = {}

    # -- requests, between steps ------------------------------------------------------------------

    @property
    def sequences(self) -> dict[int, TokenSequence]:
        return {sequence.id: sequence for sequence in self.instance.scheduler.running}

    def begin(self, number: int, blocks: int) -> None:
        request = Request(number, pack_tokens([1]), Sampling(max_tokens=9))
        self.rm.open(number)
        self.instance.scheduler.adopt(TokenSequence(request, assigned_at=0.0))
        self.grow(number, blocks)

    def grow(self, request: int, blocks: int) -> None:
        for _ in range(blocks):
            self.rm.grow(request, 1)
            self.write_tail(request)

    def write_tail(self, request: int) -> None:
        table = self.rm.tables[request]
        mark = self.marks[request, table.indices[-1]] = float(len(self.marks) % 97 + 1)
        self.write(table.slots[-1], mark)

    def write(self, slot: int, mark: float) -> None:
        rblock = self.pool.rblock(slot)
        rblock[:, 0] = 0
        for layer in range(LAYERS):
            rblock[layer, 1] = mark + layer / 2

    def holds(self, slot: int, mark: float) -> bool:
        rblock = self.pool.rblock(slot)
        values = all((rblock[layer, 1] == mark + layer / 2).all() for layer in range(LAYERS))
        return values and not rblock[:, 0].any()

    def end(self, request: int) -> None:
        self.instance.scheduler.finish(self.sequences[request])

    def return_credit(self, rng: random.Random | None = None) -> None:
        for creditor, debt in list(self.rm.borrower.debts.items()):
            self.rm.borrower.return_credit(
                creditor, rng.randint(0, debt.credit) if rng else debt.credit
            )

    # -- steps ------------------------------------------------------------------------------------

    def begin_step(self, rng: random.Random) -> None:
        moves: list[Move] = []
        leaving: list[TokenSequence] = []
        for creditor, debt in list(self.rm.borrower.debts.items()):
            act = rng.choice(("lend", "lend", "copy", "hand over"))
            if act == "lend":
                moves += self._lend(creditor, rng.choice((debt.credit, debt.credit // 2)), rng)
            elif able := self._migrants(creditor, whole=act == "hand over"):
                request = rng.choice(able)
                copied, blocks = self._copied(request)
                if act == "hand over":
                    leaving.append(self.sequences[request])
                else:
                    blocks = min(debt.credit + copied, blocks - 1)
                moves += [
                    self.rm.borrower.copy_out(request, creditor) for _ in range(copied, blocks)
                ]
        recalls = list(self._recalls(rng))
        rows = [
            Scheduled(sequence, rng.randint(1, 3))
            for sequence in self.instance.scheduler.running
            if sequence not in leaving and rng.random() < 0.7
        ]
        self.plan = Plan(rows, moves, recalls, leaving)
        self._asked = [self._remote_marks(sequence.id) for sequence, n in rows for _ in range(n)]
        self._exchanging = self.debtor.begin(self.plan, time.monotonic())

    def finish_step(self) -> None:
        """The layers, of which every row gets the mean of the marks it has elsewhere."""
        assert self.plan
        for request in self.rm.tables.keys() - {sequence.id for sequence in self.plan.leaving}:
            self.write_tail(request)
        for layer in range(LAYERS if self._exchanging else 0):
            tokens = len(self._asked)
            out, lse = torch.zeros(tokens, 1, HEAD_DIM), torch.full((tokens, 1), -math.inf)
            self.debtor.post_queries(torch.ones(tokens, 1, HEAD_DIM))
            self.debtor.merge(layer, out, lse)
            for marks, row, weight in zip(self._asked, out, lse, strict=True):
                if marks:
                    mean = sum(marks) / len(marks) + layer / 2
                    torch.testing.assert_close(row, torch.full_like(row, mean))
                    assert math.isclose(weight.exp(), len(marks) * BLOCK, rel_tol=1e-4)
                else:
                    assert weight == -math.inf
        self.debtor.finish()
        self.instance.commit(self.plan)
        self.plan = None

    def _remote_marks(self, request: int) -> list[float]:
        hosted = self.rm.tables[request].remote.values()
        return [self.marks[request, index] for indices in hosted for index in indices]

    def _lend(self, creditor: int, count: int, rng: random.Random) -> Iterator[Move]:
        for _ in range(count):
            going = {(move.key, move.block) for move in self.rm.borrower.outgoing}
            sealed = [
                (request, index)
                for request, table in self.rm.tables.items()
                if request not in self.rm.borrower.copies and not self._just_came(request, creditor)
                for index in table.indices
                if index < table.blocks - 1 and (request, index) not in going
            ]
            if sealed:
                yield self.rm.borrower.move_out(*rng.choice(sealed), creditor)

    def _migrants(self, creditor: int, whole: bool) -> list[int]:
        """Requests that can be copied to `creditor`, in this step with all that is left of them
        if `whole`."""
        going = {move.key for move in self.rm.borrower.outgoing}
        able = []
        for request, table in self.rm.tables.items():
            copied, blocks = self._copied(request)
            copies = self.rm.borrower.copies.get(request)
            fits = not whole or blocks - copied <= self.rm.borrower.debts[creditor].credit
            there = not copies or copies.creditor == creditor
            there &= not self._just_came(request, creditor)
            if fits and there and not table.remote and request not in going:
                able.append(request)
        return able

    def _just_came(self, request: int, creditor: int) -> bool:
        """Whether the step in which `creditor` hands the request over to here is not over there."""
        return request in self.nodes[creditor].rm.tables

    def _copied(self, request: int) -> tuple[int, int]:
        copies = self.rm.borrower.copies.get(request)
        return copies.blocks if copies else 0, self.rm.tables[request].blocks

    def _recalls(self, rng: random.Random) -> Iterator[Move]:
        """What DGFM planned, or anything."""
        for creditor in list(self.rm.borrower.debts):
            hosted = [
                (request, index)
                for request, table in self.rm.tables.items()
                for index in table.remote.get(creditor, ())
            ]
            planned = self.recall.pop(creditor, 0)
            for _ in range(min(rng.choice((planned, planned, 1, len(hosted))), len(hosted))):
                if self.rm.slots.usable > 0:
                    hosted.remove(chosen := rng.choice(hosted))
                    yield self.rm.borrower.bring_home(*chosen, creditor)

    # -- what must hold at every instant ----------------------------------------------------------

    def check(self) -> None:
        """The bookkeeping is sound, and what this instance serves has the right bytes."""
        self.instance.check()
        leaving = {sequence.id for sequence in self.plan.leaving} if self.plan else set()
        for request in self.rm.tables.keys() - leaving:  # new homes may be at work on those
            table = self.rm.tables[request]
            for index, slot in zip(table.indices, table.slots, strict=True):
                assert self.holds(slot, self.marks[request, index])
        for (debtor, request), guest in self.rm.lender.guests.items():
            table = self.nodes[debtor].rm.tables.get(request)  # None: it waits to be evicted
            for index, slot in zip(guest.indices, guest.slots, strict=True):
                if table and index in table.remote.get(self.number, ()):
                    assert self.holds(slot, self.marks[request, index])
