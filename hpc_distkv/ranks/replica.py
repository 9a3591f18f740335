"""What every rank of an instance does alike: it keeps a replica of the instance's state, and does
its own lane's part of the tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from hpc_distkv.control.assign.work import work
from hpc_distkv.decide.instance import Instance
from hpc_distkv.decide.pace import StepWork
from hpc_distkv.decide.plan import NOTHING, Plan, Scheduled
from hpc_distkv.decide.sequence import Sequence
from hpc_distkv.step.creditor import Creditor
from hpc_distkv.step.debtor import Debtor
from hpc_distkv.step.forward import Elsewhere, Forward
from hpc_distkv.step.host_tier import HostTier
from hpc_distkv.step.parts import Parts


class Advance(NamedTuple):
    """A step that counts as computed, before its tokens are known."""

    rows: list[Scheduled]
    ends: list[Sequence]
    """Those that get a token, in order."""
    work: StepWork
    """What the step has to compute."""


class Replica:
    """One rank's replica of its instance, and the tensors that belong to it. Whoever drives it
    says when what happens: the instance's leader (`Worker`) or its log (`Follower`)."""

    def __init__(
        self, parts: Parts, between_layers: Callable[[], None], pause: Callable[[], None]
    ) -> None:
        """The two callables as of `Forward`."""
        self.sharing = parts.config.policy.sharing
        sequence = partial(Sequence, decoder=parts.decoder)
        self.instance = Instance(parts.comm.world.instance, parts.config, sequence)
        self.debtor = Debtor(parts, self.instance)
        self.creditor = Creditor(parts, self.instance)
        self._host = HostTier(parts, parts.host_pool, self.instance.rm) if parts.host_pool else None
        self._forward = Forward(parts, self.instance.rm, between_layers, pause)
        self._lanes = parts.model.lanes
        self._block_size = parts.pool.block_size
        self._attention_tokens = parts.config.attention_tokens
        self._exchanging = False

    def compute(self, plan: Plan, now: float, drawn: torch.Tensor | None = None) -> torch.Tensor:
        """The plan's headers, moves and layers. Returns the logits of the rows that end, on the
        leader. `now`: the leader's clock; `drawn`: as of `Forward.run`, on other lanes room for
        it."""
        self._exchanging = self.sharing and self.debtor.begin(plan, now)
        elsewhere: list[Elsewhere] = [self.debtor] if self._exchanging else []
        if self._host and self._host.begin(plan):
            elsewhere.append(self._host)
        if plan.scheduled:
            self._lanes.begin(apart=not self._exchanging)
            if drawn is not None and len(drawn):
                drawn = self._lanes.spread(drawn)
        logits = self._forward.run(plan.scheduled, elsewhere, drawn)
        if self._host:
            self._host.finish()
        if self.sharing:
            self.debtor.finish()
        return logits

    def advance(self, plan: Plan) -> Advance:
        """Go on from a step that is computed, or, if nothing moves in it, being computed: commit
        its moves, and count its rows as computed."""
        self.instance.commit(plan)
        done = self._work(plan.scheduled)
        return Advance(plan.scheduled, self.instance.advance(plan.scheduled), done)

    def return_all(self, now: float) -> None:
        """Give all credit back."""
        self.instance.return_credit()
        self.debtor.begin(NOTHING, now)

    def _work(self, rows: list[Scheduled]) -> StepWork:
        tables, size = self.instance.rm.tables, self._block_size
        decodes = [sequence for sequence, count in rows if count == 1]
        shared = self.instance.rm.prefixes.at_home(sequence.id for sequence in decodes)
        return StepWork(
            decodes=len(decodes),
            kv_tokens=sum(s.length - tables[s.id].absent * size for s in decodes) + size * shared,
            prompt_work=sum(
                work(s.computed, s.computed + count, self._attention_tokens)
                for s, count in rows
                if count > 1
            ),
            exchanging=self._exchanging,
        )
