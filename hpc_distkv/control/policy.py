"""Ways to share the cluster's memory, so that each can be measured against the others, and the
settings that control needs beside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Policy:
    """What instances may do for each other."""

    lending: bool = True
    """rBlocks of a request may live at other instances (DistKV-LLM)."""
    planner: bool = True
    """Loans are also made where the performance model says that they pay (v2)."""
    dgfm: bool = True
    """Debts are repaid, and circles of debts cancelled (DGFM, v1)."""
    migrate: bool = False
    """On shortage a whole request moves to an instance with room (live migration)."""
    queue: bool = True
    """Requests go where there is time for them; otherwise they are dealt out in turn beforehand."""

    @property
    def sharing(self) -> bool:
        """Whether instances promise rBlocks to each other at all."""
        return self.lending or self.migrate


POLICIES = {
    "lend": Policy(),
    "lend-greedy": Policy(planner=False, dgfm=False),
    "migrate": Policy(lending=False, planner=False, dgfm=False, migrate=True),
    "queue": Policy(lending=False, planner=False, dgfm=False),
    "isolated": Policy(lending=False, planner=False, dgfm=False, queue=False),
}
"""`queue`: instances that share the queue of requests and no memory; `isolated`: independent
replicas, each with its part of the requests."""


class ControlConfig(Protocol):
    """What control has to know of the engines' settings, which are the same at all instances."""

    @property
    def policy(self) -> Policy:
        """What instances may do for each other."""

    @property
    def block_size(self) -> int:
        """Tokens of an rBlock."""

    @property
    def move_budget(self) -> int:
        """KV tokens that may move in a step though no request waits for them; 0: none."""

    @property
    def attention_tokens(self) -> float:
        """Context length at which a token costs twice what its linear layers cost."""

    @property
    def prefix_caching(self) -> bool:
        """Whether requests at one instance share the rBlocks of equal prefixes."""
