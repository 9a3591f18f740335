"""Which instances step together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hpc_distkv.control.messages import Answer
from hpc_distkv.engine.instance import Instance


@dataclass(eq=False, slots=True)
class Member:
    """One instance and where it stands."""

    number: int
    instance: Instance
    partners: list[int] = field(default_factory=list)
    ready: float = 0.0
    """When it was last ready for a joint step."""
    alone: Group = field(init=False)
    """Its group while it has no partners."""
    next: Group = field(init=False)
    """Its group from its next boundary on."""

    def __post_init__(self) -> None:
        self.next = self.alone = Group([self])


@dataclass(eq=False, slots=True)
class Group:
    """A component of the debt graph, or one instance without loans."""

    members: list[Member]
    steps_left: int = 0
    """Joint steps until the next boundary."""
    step: int = 0
    """Joint steps taken."""
    missing: int = 1
    """Members that have not passed the boundary at which it forms."""

    @property
    def joint(self) -> bool:
        """Whether it is a component."""
        return len(self.members) > 1


def form_groups(members: Sequence[Member], answers: Sequence[Answer]) -> None:
    """Give every member its next group, as the partners in all answers say."""
    for member in members:
        member.next = member.alone
    for member, answer in zip(members, answers, strict=True):
        if not answer.partners or member.next is not member.alone:
            continue
        component, todo = {member.number}, [member.number]
        while todo:
            new = set(answers[todo.pop()].partners) - component
            component |= new
            todo += new
        group = Group([members[n] for n in sorted(component)], answer.steps)
        group.missing = len(component)
        for other in group.members:
            other.next = group
