"""Steps in virtual time: the engine's own plans and bookkeeping, and the cost model's seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import attrgetter

from hpc_distkv.control.messages.loans import Header
from hpc_distkv.decide.instance import Instance
from hpc_distkv.decide.pace import StepSeconds, StepWork
from hpc_distkv.decide.plan import Plan, host_queries
from hpc_distkv.ids import InstanceId, PrefixId
from hpc_distkv.memory.loan import Move
from hpc_distkv.simulate.deployment import Deployment
from hpc_distkv.simulate.host_memory import HostCost, HostQueries, HostTime
from hpc_distkv.simulate.member import DebtorLoad, Member, StepLoad
from hpc_distkv.simulate.models import ModelShape

LEAST_SECONDS = 1e-6
"""Of a step with rows, however fast the cluster."""


class Steps:
    """Begins and ends the steps of instances, with all they do at their creditors.

    A header reaches its creditors at the beginning of the debtor's step, and its moves and queries
    are done there at the end of that step: one of the orders that the engine allows. In each layer
    queries leave, own attention runs while they and the partial results are under way and the
    creditor finds the time to attend to its guests; only what is longer than own attention shows.
    """

    def __init__(self, deployment: Deployment, members: Sequence[Member]) -> None:
        """Raises OptionError for a cluster that does not say how fast it is."""
        self.cost = deployment.cost()
        self._members = members
        self.links = deployment.links(self.cost)
        self._block_size = deployment.config.block_size
        self._host: HostCost | None = None
        if deployment.config.host_blocks:
            self._host = HostCost(self.cost.rates, deployment.config)
        self._block_bytes = deployment.block_bytes
        self._wire_bytes = deployment.model.wire_bytes
        self._unevenness = _unevenness(deployment.model)

    def begin(self, member: Member, now: float) -> float:
        """Plan a step, and tell its creditors. Returns the seconds that it lasts if nobody is
        served: 0 for one without rows and moves, which is to be ended at once."""
        instance = member.instance
        plan = instance.plan()
        member.begin(now, plan)
        attention = 0.0
        if plan.scheduled:
            member.load = load = self._load(instance, plan)
            member.computing = max(LEAST_SECONDS, self.cost.step_time(*load[:4]))
            attention = self.cost.attention_time(load.decode_kv, load.prefill_pairs)
            member.gaps = self._gaps(attention, member.computing - attention)
        host = self._host_time(member, attention)
        member.lasting = host.before + member.computing + host.attending
        instance.counters.move_wait += host.before
        instance.counters.host_time += host.attending
        if instance.rm.borrower.debts:
            self._visit_creditors(member, attention + host.attending, host.beside, now)
        else:
            self._await_moves(member, host.beside)
        return member.lasting

    def end(self, member: Member, now: float) -> bool:
        """The step is over, here and at its creditors. Returns whether it was not idle."""
        instance, plan, load = member.instance, member.plan, member.load
        assert plan is not None
        for creditor in member.creditors:
            creditor.count_serving(now)
            visit = creditor.visits.pop(member.number)
            creditor.instance.counters.serve_time += visit.seconds
            creditor.instance.commit_served(member.number, visit.outgoing, visit.incoming)
        member.creditors = []
        instance.commit(plan)
        member.plan, member.gaps = None, 0.0
        if not plan.scheduled:
            return not plan.idle
        instance.append(plan.scheduled, [0] * load.new_tokens, now)
        took, waited = now - member.began, member.partial_wait
        prompts = load.prefill_tokens + load.prefill_pairs / instance.config.attention_tokens
        work = StepWork(load.decode_rows, round(load.decode_kv), prompts, member.exchanging)
        instance.note_step(work, StepSeconds(took, waited, took - member.computing - waited))
        return True

    def _load(self, instance: Instance, plan: Plan) -> StepLoad:
        rm, size = instance.rm, self._block_size
        decodes = prefill = new = 0
        kv = pairs = 0.0
        readers = Counter[PrefixId]()
        """Prefix → decode rows that it is read for, once."""
        for sequence, count in plan.scheduled:
            table, chain = rm.tables[sequence.id], rm.prefixes.chain(sequence.id)
            new += sequence.length - sequence.computed == count
            own = sequence.computed - table.absent * size
            if count == 1:
                decodes += 1
                kv += own + 1
                readers.update(prefix.id for prefix in chain)
            else:
                at_home = own + size * sum(len(prefix.slots) for prefix in chain)
                prefill += count
                pairs += count * at_home + count * (count + 1) / 2
        for number, rows in readers.items():
            kv += self.cost.read_for(rows, size * len(rm.tables[number].slots))
        return StepLoad(decodes, kv, prefill, pairs, new)

    def _gaps(self, attention: float, linear: float) -> float:
        """Seconds that a query in each layer waits for the operator during which it comes: half of
        what that one takes, weighed by how likely it is that one."""
        both = attention + linear
        return (attention**2 + self._unevenness * linear**2) / (2 * both) if both else 0.0

    # -- the host's memory ----------------------------------------------------------------------

    def _host_time(self, member: Member, attention: float) -> HostTime:
        plan, rm = member.plan, member.instance.rm
        assert plan is not None
        if self._host is None:
            return HostTime()
        legs = []
        for keys, asked in groupby(host_queries(rm, plan.scheduled), key=attrgetter("guests")):
            blocks = sum(len(rm.tables[key].in_host) for key in keys)
            legs.append(HostQueries(sum(query.rows for query in asked), blocks * self._block_size))
        moves = len(plan.to_host) + len(plan.from_host)
        return self._host.time(moves, legs, attention, member.computing)

    # -- creditors ------------------------------------------------------------------------------

    def _visit_creditors(
        self, member: Member, attention: float, copying: float, now: float
    ) -> None:
        """Send the headers, and see what the step takes with all that its creditors do. `copying`:
        seconds of copies to and from the host's memory, beside its layers."""
        plan, counters = member.plan, member.instance.counters
        assert plan is not None
        headers = member.instance.headers(plan, now)
        member.creditors = [self._members[number] for number in headers]
        moved = {
            c: self._members[c].instance.accept(member.number, h, now) for c, h in headers.items()
        }
        served = {c: self._serving(self._members[c], member.number, h) for c, h in headers.items()}
        legs = [
            (sum(rows for _, rows, _ in h.queries), self.links.between(member.number, c))
            for c, h in headers.items()
        ]
        remote = max(
            (s + self._members[c].delay(member.number) for c, s in served.items() if s), default=0.0
        )
        exchange = self.cost.exchanges_time(legs) + remote
        member.exchanging = any(rows for rows, _ in legs)
        member.partial_wait = exposed = self.cost.overlap(attention, exchange)
        member.lasting += exposed
        counters.partial_wait += exposed
        moves = (self._moving(member.number, m) for m in (plan.moves, plan.recalls))
        self._await_moves(member, max(copying, *moves))
        counters.bytes_queried += sum(rows for rows, _ in legs) * self._wire_bytes
        counters.bytes_moved += (len(plan.moves) + len(plan.recalls)) * self._block_bytes
        for number, seconds in served.items():
            creditor = self._members[number]
            creditor.count_serving(now)
            rate = seconds / member.lasting if seconds else 0.0
            creditor.visits[member.number] = DebtorLoad(seconds, rate, *moved[number])

    def _serving(self, creditor: Member, debtor: InstanceId, header: Header) -> float:
        """Seconds of MicroAttention for the queries of a header: all guest rBlocks are sealed."""
        kv = pairs = 0.0
        asked = Counter((tuple(keys), rows) for keys, rows, _ in header.queries)
        for (keys, rows), times in asked.items():
            guests = (creditor.instance.rm.lender.guests[debtor, key] for key in keys)
            tokens = sum(len(guest.slots) for guest in guests) * self._block_size
            if rows == 1:
                kv += self.cost.read_for(times, tokens)
            else:
                pairs += times * rows * tokens
        return self.cost.attention_time(kv, pairs)

    @staticmethod
    def _await_moves(member: Member, seconds: float) -> None:
        """The step ends no sooner than what moves beside it."""
        wait = max(0.0, seconds - member.lasting)
        member.instance.counters.move_wait += wait
        member.lasting += wait

    def _moving(self, number: int, moves: Iterable[Move]) -> float:
        """Seconds of moves in one direction, one behind the other."""
        blocks = Counter(move.peer for move in moves)
        return sum(self.cost.move_time(n, self.links.between(number, p)) for p, n in blocks.items())


def _unevenness(model: ModelShape) -> float:
    """Σ share² of the linear operators of a layer, between which guests are served."""
    up = (2 if model.gated else 1) * model.intermediate
    query, key_value = model.heads * model.head_dim, 2 * model.kv_heads * model.head_dim
    sizes = [query + key_value, query, up, model.intermediate]
    return sum(size**2 for size in sizes) / sum(sizes) ** 2
