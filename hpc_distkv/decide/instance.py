"""One instance between its messages: reports out, answers in, plans, headers, tokens."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Container, Mapping
from collections.abc import Sequence as SequenceOf

from hpc_distkv.control.messages.counters import Counters
from hpc_distkv.control.messages.loans import Header
from hpc_distkv.control.messages.percentiles import gap_bin
from hpc_distkv.control.messages.reports import Answer, Remains, Report
from hpc_distkv.control.messages.requests import Request, Result
from hpc_distkv.decide.config import EngineConfig
from hpc_distkv.decide.migration import Handovers, handover
from hpc_distkv.decide.pace import Pace, StepSeconds, StepWork
from hpc_distkv.decide.plan import Plan, S, Scheduled, remote_queries
from hpc_distkv.decide.reporting import Reporting
from hpc_distkv.decide.scheduler import Scheduler
from hpc_distkv.decide.sequence import Sequence, TokenSequence
from hpc_distkv.ids import InstanceId, RequestId
from hpc_distkv.memory.loan import Move, MoveKind, ProtocolError
from hpc_distkv.memory.rmanager import RManager

log = logging.getLogger(__name__)

NO_LOGPROBS: Mapping[int, bytes] = {}


class Instance:
    """Decides all that one instance does. The ranks drive it with real messages and tensors, the
    simulator in virtual time.

        boundary:  apply(answer) → credits() to debtors → report()
        step:      plan() → headers(plan) to creditors → compute → commit(plan) → append(tokens)
                   append(tokens) is advance() and learn(tokens). Between the two, steps without
                   moves may be planned and computed ahead: advance() → plan(ahead) → compute →
                   learn(tokens of the first) → advance() → …
        any time:  accept(header of a debtor) → serve its queries, move → commit_served
                   open_credit(from a creditor)
    """

    def __init__(
        self,
        number: InstanceId,
        config: EngineConfig,
        sequence: Callable[[Request, float], Sequence] = TokenSequence,
    ) -> None:
        self.config = config
        self.counters = Counters()
        self.rm = RManager(number, config.num_blocks, config.lend_cap, config.host_blocks)
        self.scheduler = Scheduler(self.rm, config, self.counters)
        self.pace = Pace(config.host_copy_seconds)
        self.round = 0
        self._sequence = sequence
        self._handovers = Handovers(self.rm, sequence)
        self._reporting = Reporting(self.scheduler, self._handovers, self.pace)
        self._over: set[RequestId] = set()
        """Finished requests that the step under way computes once more: it uses their rBlocks."""

    # -- boundaries -----------------------------------------------------------------------------

    def apply(self, answer: Answer, now: float) -> None:
        """Apply the answer to the last report. Raises ProtocolError for any other. Grants beyond
        the promise are refused, and counted."""
        if answer.round != self.round:
            raise ProtocolError(
                f"instance {self.rm.instance} got the answer of round {answer.round} "
                f"in round {self.round}"
            )
        for debtor in self.rm.lender.settle(answer.lend):
            self.counters.refused_grants += 1
            log.error("refused a grant to instance %d beyond the promise: %s", debtor, answer.lend)
        for request in answer.assign:
            self.scheduler.add(self._sequence(request, now))
        self.scheduler.apply(answer, self._reporting.asked)
        returned = self.scheduler.give_back(answer.give_back)
        self._reporting.applied(bool(answer.lend), returned)
        self.round += 1

    def report(self, drain: bool = False, halt: bool = False) -> Report:
        """The report of this round. `drain` and `halt`: what this rank wants of the run."""
        return self._reporting.report(self.round, drain, halt)

    def remains(self) -> Remains:
        """What is left to report when the run has ended: counters, results that were not reported,
        and the tokens of requests that did not finish."""
        return self._reporting.remains()

    def stop(self) -> None:
        """The run is over: free all rBlocks. Sequences that ran keep their tokens (`remains`)."""
        self.scheduler.stop()

    def credits(self) -> dict[InstanceId, int]:
        """Debtor → rBlocks set aside for it that it has to be told of."""
        granted = [debtor for debtor, loan in self.rm.lender.loans.items() if loan.unopened]
        return {debtor: self.rm.lender.open_credit(debtor) for debtor in granted}

    def return_credit(self) -> None:
        """Give all credit back: the next headers tell the creditors."""
        for creditor, debt in self.rm.borrower.debts.items():
            self.rm.borrower.return_credit(creditor, debt.credit)

    # -- steps ----------------------------------------------------------------------------------

    def plan(self, ahead: bool = False) -> Plan:
        """What the next step computes and moves. `ahead`: the device still computes the step before
        (`look_ahead`)."""
        return self.scheduler.plan(ahead)

    def headers(self, plan: Plan, now: float) -> dict[InstanceId, Header]:
        """Creditor → what it has to know of this step; creditors without news are left out."""
        queries = remote_queries(self.rm, plan.scheduled)
        leaving = {s.id: self.rm.borrower.copies[s.id].creditor for s in plan.leaving}
        creditors = {move.peer for move in (*plan.moves, *plan.recalls)}
        creditors |= {c for c, debt in self.rm.borrower.debts.items() if debt.news}
        headers = {}
        for creditor in sorted({*queries, *creditors, *leaving.values()}):
            news = self.rm.borrower.settle(creditor)
            headers[creditor] = Header(
                splits=list(news.splits),
                released=list(news.released),
                dropped=list(news.dropped),
                returned=news.returned,
                moves=[(m.key, m.block) for m in plan.moves if m.peer == creditor],
                recalls=[(m.key, m.block) for m in plan.recalls if m.peer == creditor],
                handovers=[handover(s, now) for s in plan.leaving if leaving[s.id] == creditor],
                queries=[query.asked for query in queries.get(creditor, [])],
            )
        return headers

    def commit(self, plan: Plan) -> None:
        """The moves of this instance's own step have arrived."""
        for move in plan.moves:
            self.counters.blocks_borrowed += move.kind is MoveKind.LEND
            self.counters.blocks_copied += move.kind is MoveKind.COPY
        self.counters.blocks_returned += len(plan.recalls)
        self.counters.blocks_to_host += len(plan.to_host)
        self.counters.blocks_from_host += len(plan.from_host)
        self.counters.peak_host = max(self.counters.peak_host, self.rm.swap.used)
        self.rm.borrower.commit(plan.moves, plan.recalls)
        self.rm.swap.commit(plan.to_host, plan.from_host)
        self.scheduler.commit()
        for sequence in plan.leaving:
            self.scheduler.hand_over(sequence)
        for sequence in self._handovers.leave(plan.leaving):
            self.scheduler.adopt(sequence)
        self.counters.migrations += len(plan.leaving)
        self.counters.peak_borrowed = max(self.counters.peak_borrowed, self.rm.borrower.borrowed)

    def append(
        self,
        scheduled: SequenceOf[Scheduled[Sequence]],
        tokens: SequenceOf[int],
        now: float,
        logprobs: Mapping[int, bytes] = NO_LOGPROBS,
    ) -> None:
        """The step is computed: `advance` and `learn`. `tokens`: one for each sequence that has no
        token left to compute, in order; `logprobs`: request → its record, if it asks for one."""
        self.learn(scheduled, self.advance(scheduled), tokens, now, logprobs)

    def advance(self, scheduled: SequenceOf[Scheduled[S]]) -> list[S]:
        """Count the step's tokens as computed. Returns the sequences that have no token left to
        compute, in order: the n-th goes on with the n-th token that the step draws, which is not
        known yet."""
        ends: list[S] = []
        sealing = self.rm.prefixes.computing
        for sequence, count in scheduled:
            ending = sequence.remaining == count
            if sequence.id not in self._over:
                if count > 1 or sequence.output_len == 0:
                    self.counters.prompt_tokens += count
                sequence.computed += count
                if sealing:
                    self.rm.prefixes.seal(sequence.id, sequence.computed // self.config.block_size)
                if ending:
                    sequence.expect(len(ends))
            if ending:
                ends.append(sequence)
        return ends

    def learn(
        self,
        scheduled: SequenceOf[Scheduled[Sequence]],
        ends: SequenceOf[Sequence],
        tokens: SequenceOf[int],
        now: float,
        logprobs: Mapping[int, bytes] = NO_LOGPROBS,
        following: Container[int] = (),
    ) -> None:
        """The step of `scheduled` has ended: its `ends`, of `advance`, have got `tokens`.
        `following`: requests in the next step if that is under way. Those that finish here are
        computed once too often there, and keep their rBlocks until that step has ended too."""
        over, self._over = self._over, set()
        if self.config.window:
            for sequence, _ in scheduled:
                if sequence.id not in over:
                    self._drop_unseen(sequence)
        gaps = Counter[float]()
        for sequence, token in zip(ends, tokens, strict=True):
            if sequence.id in over:
                continue
            if sequence.last_token_at is not None:
                gaps[now - sequence.last_token_at] += 1
            sequence.learn(token, now, logprobs.get(sequence.id, b""))
            if reason := sequence.finish_reason():
                self._finish(sequence, reason, now, sequence.id in following)
        for seconds, count in gaps.items():
            gap = gap_bin(seconds)
            self.counters.gaps[gap] = self.counters.gaps.get(gap, 0) + count
        for request in over:
            self.rm.close(request)
        self.counters.generated_tokens += len(tokens) - len(over)

    def _drop_unseen(self, sequence: Sequence) -> None:
        """Free the rBlocks wholly behind the window of the sequence's next query."""
        query = sequence.computed
        if self.config.host_blocks:  # It may be swapped out, and go on from what is sealed.
            query -= query % self.config.block_size
        unseen = (query - self.config.window + 1) // self.config.block_size
        if unseen > self.rm.tables[sequence.id].start:
            self.rm.drop(sequence.id, unseen)

    def _finish(self, sequence: Sequence, reason: str, now: float, in_use: bool) -> None:
        self.scheduler.finish(sequence, in_use)
        if in_use:
            self._over.add(sequence.id)
        assert sequence.first_token_at is not None
        self._reporting.finished(
            Result(
                id=sequence.id,
                tokens=sequence.packed_output,
                finish_reason=reason,
                first_token_time=sequence.first_token_at - sequence.assigned_at,
                total_time=now - sequence.assigned_at,
                logprobs=sequence.packed_logprobs,
                text_end=sequence.text_end,
            )
        )

    def note_step(self, work: StepWork, seconds: StepSeconds) -> None:
        """Take the measured time of a step with sequences."""
        self.counters.steps += 1
        self.counters.step_time += seconds.total
        self.counters.held_block_steps += self.rm.held
        self.counters.remote_block_steps += self.rm.borrower.borrowed
        self.pace.note(work, seconds)
        self.scheduler.calibrate(self.pace.calibration)

    # -- messages of others, at any time --------------------------------------------------------

    def accept(
        self, debtor: InstanceId, header: Header, now: float
    ) -> tuple[list[Move], list[Move]]:
        """Apply a header. Returns the moves that it asks for, out of this instance and into it.
        The debtor's next header may be accepted after `commit_served`. Raises ProtocolError."""
        self.rm.lender.split(debtor, header.splits)
        self.rm.lender.evict(debtor, header.released)
        self.rm.lender.evict_dropped(debtor, header.dropped)
        self.rm.lender.take_back(debtor, header.returned)
        incoming = self.rm.lender.host(debtor, header.moves)
        outgoing = self.rm.lender.give_back(debtor, header.recalls)
        self._handovers.arrive(debtor, header.handovers, now)
        return outgoing, incoming

    def open_credit(self, creditor: InstanceId, blocks: int) -> None:
        """A creditor has set rBlocks aside for this instance."""
        self.rm.borrower.credit_opened(creditor, blocks)

    def commit_served(
        self, debtor: InstanceId, outgoing: SequenceOf[Move], incoming: SequenceOf[Move]
    ) -> None:
        """The moves of a header have arrived, and its queries have been served."""
        self.counters.blocks_lent += len(incoming)
        self.rm.lender.commit(outgoing, incoming)
        for sequence in self._handovers.settle(debtor):
            self.scheduler.adopt(sequence)

    def check(self) -> None:
        """Assert the bookkeeping invariants."""
        self.rm.check()
