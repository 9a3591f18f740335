"""Tensors of a device keep the contract of all transports, however late their copies end."""

from __future__ import annotations

import pytest
import torch
from comm_contract import (
    all_kinds_at_once,
    channels_do_not_mix,
    closing_leaves_nothing,
    exchanges_arrive_in_order,
    receives_may_come_first_or_last,
)
from deferred_copies import stage
from local_ranks import leftovers, open_local, run_local
from seeded_schedule import SeededSchedule

PROMISES = (
    exchanges_arrive_in_order,
    receives_may_come_first_or_last,
    channels_do_not_mix,
    all_kinds_at_once,
    closing_leaves_nothing,
)


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
@pytest.mark.parametrize("seed", range(2))
def test_interleavings_of_copies_and_messages_keep_the_contract(promise, seed):
    comms = open_local(2 + seed % 2, schedule=SeededSchedule(seed))
    stage(comms)
    run_local(comms, promise)
    assert leftovers(comms) == []


def test_nothing_is_sent_before_its_copy_has_ended_nor_before_what_was_asked_for_earlier():
    comms = open_local(2)
    copies, _ = stage(comms)
    sender, receiver = comms
    first, second = torch.full((4,), 1.0), torch.full((4,), 2.0)
    into = [torch.zeros(4), torch.zeros(4)]
    arriving = [receiver.transport.exchange([], [(0, tensor)]) for tensor in into]
    leaving = [sender.transport.exchange([(1, tensor)], []) for tensor in (first, second)]
    early, late = copies.waiting
    late.happen()
    late.past = True  # as no stream would do: the second copy ends first
    assert not any(pending.done() for pending in (*leaving, *arriving))
    early.happen()
    early.past = True
    assert [pending.done() for pending in (*leaving, *arriving)] == [True] * 4
    assert [tensor.tolist() for tensor in into] == [[1.0] * 4, [2.0] * 4]


def test_a_tensor_may_be_overwritten_once_its_send_is_done_and_is_not_lost_before():
    comms = open_local(2)
    copies, _ = stage(comms)
    tensor, into = torch.ones(3), torch.zeros(3)
    leaving = comms[0].transport.exchange([(1, tensor)], [])
    del tensor
    arriving = comms[1].transport.exchange([], [(0, into)])
    assert not comms[0].transport.drained()
    copies.happen()
    leaving.wait("the send")
    arriving.wait("the receive")
    assert into.tolist() == [1.0] * 3
    assert comms[0].transport.drained()
    assert comms[1].transport.drained()
