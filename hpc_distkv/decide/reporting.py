"""What an instance reports to the gManager."""

from __future__ import annotations

from hpc_distkv.control.messages.counters import Counters
from hpc_distkv.control.messages.reports import NO_REQUEST, Changes, Remains, Report
from hpc_distkv.control.messages.requests import Result, Unfinished, work
from hpc_distkv.decide.demand import lacking, large_rows, longest
from hpc_distkv.decide.migration import Handovers
from hpc_distkv.decide.pace import Pace
from hpc_distkv.decide.scheduler import Scheduler
from hpc_distkv.decide.sequence import Sequence
from hpc_distkv.ids import InstanceId

COUNTED_ROUNDS = 25
"""Reports between two that carry the counters while there is work."""


class Reporting:
    """Makes the reports of one instance. Owner of what was reported last and of what was not
    reported yet."""

    def __init__(self, scheduler: Scheduler, handovers: Handovers, pace: Pace) -> None:
        self.asked = 0
        """rBlocks that the last report wanted to borrow."""
        self._results: list[Result] = []
        """Of requests that have finished since the last report."""
        self._returned: list[Sequence] = []
        """Those that go elsewhere."""
        self._lent: dict[InstanceId, int] | None = {}
        """As reported last; None: to be reported again."""
        self._scheduler, self._handovers, self._pace = scheduler, handovers, pace
        self._config, self._rm = scheduler.config, scheduler.rm
        self._counters = scheduler.counters

    def finished(self, result: Result) -> None:
        """A request has its result."""
        self._results.append(result)

    def applied(self, granted: bool, returned: list[Sequence]) -> None:
        """An answer was applied: whether it `granted` loans, and the sequences that it took."""
        self._returned = returned
        if granted:  # The ledger counts the grants by now: report what became of them.
            self._lent = None

    def report(self, round: int, drain: bool, halt: bool) -> Report:
        """As of `Instance.report`, at the boundary of this round."""
        scheduler, rm, counters = self._scheduler, self._rm, self._counters
        demand, room = scheduler.demand(), scheduler.room()
        sharing = self._config.policy.sharing
        self.asked = demand.wanted
        running = scheduler.running
        youngest = running[-1] if running else None
        speed = self._pace.speed
        return Report(
            round=round,
            capacity=rm.slots.num_blocks,
            free=rm.slots.free,
            promised=rm.lender.promise(demand.lendable if sharing else 0),
            hosted=rm.lender.hosted,
            wanted=demand.wanted if sharing else 0,
            wanted_for=demand.wanted_for,
            largest=demand.largest,
            starved=demand.starved,
            room_requests=room[0],
            room_tokens=room[1],
            running=len(running),
            waiting=scheduler.fresh,
            seats=max(0, self._config.max_num_seqs - len(running)),
            youngest=youngest.id if youngest else NO_REQUEST,
            youngest_blocks=rm.held_alone(youngest.id) if youngest else 0,
            longest=longest(scheduler) if sharing else 0,
            lacking=lacking(scheduler) if self._config.policy.planner else 0,
            prompt_tokens=counters.prompt_tokens,
            generated_tokens=counters.generated_tokens,
            kv_tokens=self._kv_tokens(),
            work_left=self._work_left(),
            request_blocks=self._request_blocks(),
            fixed=speed.fixed,
            per_token=speed.per_token,
            per_kv=speed.per_kv,
            prompt_time=speed.prompt,
            exchange=speed.exchange,
            drain=drain,
            halt=halt,
            changes=self._changes(round),
        )

    def remains(self) -> Remains:
        """As of `Instance.remains`."""
        sequences = (*self._scheduler.running, *self._scheduler.waiting)
        unfinished = [
            Unfinished(s.id, s.packed_output, s.packed_logprobs) for s in sequences if s.output_len
        ]
        return Remains(self._count(), self._results, unfinished)

    def _changes(self, round: int) -> Changes:
        lent = {debtor: loan.total for debtor, loan in self._rm.lender.loans.items()}
        idle = not self._scheduler.running and not self._scheduler.waiting
        changes = Changes(
            lent=lent if lent != self._lent else None,
            results=self._results,
            adopted=self._handovers.take_adopted(),
            returned=[sequence.request for sequence in self._returned],
            large=large_rows(self._scheduler),
            counters=self._count() if idle or round % COUNTED_ROUNDS == 0 else None,
        )
        self._lent, self._results, self._returned = lent, [], []
        return changes

    def _count(self) -> Counters:
        self._counters.prediction_error = self._pace.steps.error
        return self._counters

    def _kv_tokens(self) -> int:
        running, size = self._scheduler.running, self._config.block_size
        own = sum(s.computed - size * self._rm.tables[s.id].absent for s in running)
        shared = self._rm.prefixes.at_home(s.id for s in running)
        return own + size * (shared + self._rm.lender.hosted)

    def _work_left(self) -> float:
        sequences = (*self._scheduler.running, *self._scheduler.waiting)
        foresight, per_row = self._scheduler.foresight, self._config.attention_tokens
        return sum(
            work(s.length - foresight.uncomputed(s), foresight.expected_end(s), per_row)
            for s in sequences
        )

    def _request_blocks(self) -> float:
        """Mean expected rBlocks of the waiting requests: those to come are most like them."""
        sequences = self._scheduler.waiting or self._scheduler.running
        if not sequences:
            return 0.0
        return (
            sum(self._scheduler.foresight.expected_end(s) for s in sequences)
            / len(sequences)
            / self._config.block_size
        )
