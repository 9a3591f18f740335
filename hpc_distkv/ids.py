"""The types of ids, so that mypy refuses to mix them. At run time and on the wire all are ints."""

from __future__ import annotations

from typing import NewType, TypeAlias

InstanceId = NewType("InstanceId", int)
"""An instance, from 0: a debtor, a creditor."""
RequestId = NewType("RequestId", int)
"""A request's place in the global order, from 0: lower is older."""
PrefixId = NewType("PrefixId", int)
"""A prefix of one instance; negative, so that it is no request's."""
TableKey: TypeAlias = RequestId | PrefixId
"""Whose block table it is."""
