"""Steps in virtual time: the engine's own plans and bookkeeping, and the cost model's seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from hpc_distkv.control.messages import Header
from hpc_distkv.engine.instance import Instance, StepWork
from hpc_distkv.engine.scheduler import Plan
from hpc_distkv.memory.loan import Move
from hpc_distkv.simulate.cost import CostModel
from hpc_distkv.simulate.deployment import Deployment
from hpc_distkv.simulate.group import Group, Member

HEADER_SECONDS = 1e-4
"""Assumed: the exchange of headers before a joint step."""
LEAST_SECONDS = 1e-6
"""Of a step with rows, however fast the cluster."""


class Load(NamedTuple):
    """What the rows of a step compute at home: as in `CostModel.step_time`."""

    decode_rows: int
    decode_kv: int
    prefill_tokens: int
    prefill_pairs: float
    new_tokens: int
    """Rows that get a token."""


class Steps:
    """Takes the steps of a deployment's instances, each at once, and says when it ends."""

    def __init__(self, deployment: Deployment) -> None:
        """Raises OptionError for a deployment that has no cost model."""
        self.cost = deployment.cost()
        self._deployment = deployment
        self._block_size = deployment.config.block_size
        self._block_bytes = int(self.cost.block_bytes * deployment.tp)
        self._wire_bytes = deployment.model.wire_bytes

    def alone(self, instance: Instance, now: float) -> float | None:
        """A step without partners: its end, or None if there was nothing to do."""
        plan = instance.plan()
        if not plan.rows:
            instance.note_idle()
            return None
        load = self.load(instance, plan)
        seconds = max(LEAST_SECONDS, self.cost.step_time(*load[:4]))
        instance.append(plan.rows, [0] * load.new_tokens, now + seconds)
        work = StepWork(load.decode_rows, load.decode_kv, load.prefill_tokens > 0)
        instance.note_step(work, seconds, 0.0)
        return now + seconds

    def joint(self, group: Group, now: float) -> float:
        """A joint step that begins when all members are ready, `now`: as long as the slowest."""
        turns = {member.number: _Turn(self, member) for member in group.members}
        for turn in turns.values():
            turn.announce(group.step, now)
        for turn in turns.values():
            turn.accept(turns, now)
        for turn in turns.values():
            turn.take_time(turns)
        end = now + HEADER_SECONDS + max(turn.seconds for turn in turns.values())
        for turn in turns.values():
            turn.finish(end)
        return end

    def load(self, instance: Instance, plan: Plan) -> Load:
        """What the rows compute with their rBlocks at home."""
        rm = instance.rm
        decodes = kv = prefill = new = 0
        pairs = 0.0
        for sequence, count in plan.rows:
            at_home = sequence.computed
            new += sequence.length - at_home == count
            if rm.debts:
                at_home -= self.tokens(rm.tables[sequence.id].remote_blocks)
            if count == 1:
                decodes += 1
                kv += at_home + 1
            else:
                prefill += count
                pairs += count * at_home + count * (count + 1) / 2
        return Load(decodes, kv, prefill, pairs, new)

    def tokens(self, blocks: int) -> int:
        """KV tokens in sealed rBlocks."""
        return blocks * self._block_size

    def exchange(self, number: int, rows: Mapping[int, int]) -> float:
        """Seconds of one member's exchanges: `rows` by partner."""
        level = self._deployment.level
        return self.cost.exchanges_time((n, level(number, p)) for p, n in rows.items())

    def moves(self, number: int, moves: Iterable[Move]) -> float:
        """Seconds of one member's moves in one direction, one behind the other."""
        level = self._deployment.level
        blocks = Counter(move.peer for move in moves)
        return sum(self.cost.move_time(n, level(number, peer)) for peer, n in blocks.items())

    def count_bytes(self, instance: Instance, queries: int, blocks: int) -> None:
        """Count what would have gone out of an instance: queries with their way back, rBlocks."""
        instance.counters.bytes_queried += queries * self._wire_bytes
        instance.counters.bytes_moved += blocks * self._block_bytes


class _Turn:
    """The part of one member in a joint step; its methods stand in their order."""

    def __init__(self, steps: Steps, member: Member) -> None:
        self._steps, self._member, self._instance = steps, member, member.instance
        self._asked = Counter[int]()
        """Creditor → query rows sent there."""
        self._asking = Counter[int]()
        """Debtor → query rows it sends."""
        self._headers: dict[int, Header] = {}
        self._served_kv = 0
        self._served_pairs = 0.0

    def announce(self, step: int, now: float) -> None:
        """Plan, and write a header to every partner."""
        self._plan = plan = self._instance.plan()
        self._load = self._steps.load(self._instance, plan)
        queries: dict[int, list[tuple[int, int]]] = {p: [] for p in self._member.partners}
        for sequence, count in plan.rows:
            for creditor in self._instance.rm.tables[sequence.id].remote:
                queries[creditor].append((sequence.id, count))
                self._asked[creditor] += count
        for partner, wanted in queries.items():
            self._headers[partner] = self._instance.header(partner, plan, step, wanted, now)

    def accept(self, turns: Mapping[int, _Turn], now: float) -> None:
        """Take the partners' headers."""
        number = self._member.number
        headers = {p: turns[p]._headers[number] for p in self._member.partners}
        outgoing, incoming = self._instance.accept(headers, now)
        self._outgoing = [*self._plan.moves, *outgoing]
        self._incoming = [*incoming, *self._plan.recalls]
        guests = self._instance.rm.guests
        for debtor, header in headers.items():
            for request, rows in header.queries:
                tokens = self._steps.tokens(len(guests[debtor, request].slots))
                self._asking[debtor] += rows
                if rows == 1:
                    self._served_kv += tokens
                else:
                    self._served_pairs += rows * tokens
        self._serving = self._steps.cost.attention_time(self._served_kv, self._served_pairs)

    def take_time(self, turns: Mapping[int, _Turn]) -> None:
        """Computing, and what it does not hide of exchanges and moves.

        In each layer a debtor attends to its own rBlocks while queries and partial results are
        under way and its creditors attend to their guests, all guests in one call.
        """
        steps, load, number = self._steps, self._load, self._member.number
        self._computing = steps.cost.step_time(*load[:4], self._served_kv, self._served_pairs)
        if load.decode_rows:
            self._computing = max(LEAST_SECONDS, self._computing)
        self._exposed = 0.0
        if self._asked or self._asking:
            remote = max((turns[creditor]._serving for creditor in self._asked), default=0.0)
            exchange = steps.exchange(number, self._asked + self._asking) + remote
            local = steps.cost.attention_time(load.decode_kv, load.prefill_pairs)
            self._exposed = steps.cost.overlap(local, exchange)
        ways = [steps.moves(number, moves) for moves in (self._outgoing, self._incoming) if moves]
        self.seconds = max(self._computing + self._exposed, *ways, 0.0)

    def finish(self, end: float) -> None:
        """The step has ended for all members."""
        instance, load, rows = self._instance, self._load, self._plan.rows
        took = end - self._member.ready
        instance.counters.partial_wait += self._exposed
        instance.counters.move_wait += self.seconds - self._computing - self._exposed
        instance.counters.header_wait += took - self.seconds
        self._steps.count_bytes(instance, self._asked.total(), len(self._outgoing))
        instance.commit()
        instance.append(rows, [0] * load.new_tokens, end)
        self._member.ready = end
        if not rows and not self._asked and not self._asking:
            instance.note_idle()
            return
        prompts = load.prefill_tokens > 0 or self._served_pairs > 0
        work = StepWork(load.decode_rows, load.decode_kv + self._served_kv, prompts)
        instance.note_step(work, took, took - self._computing)
