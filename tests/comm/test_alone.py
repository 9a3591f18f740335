"""A world of one rank."""

from __future__ import annotations

import pytest
import torch

from hpc_distkv.comm.alone import open_alone


def test_a_rank_alone_shares_with_itself_and_closes():
    comm = open_alone()
    comm.transport.exchange([], []).wait("nothing")
    assert comm.mail.poll() is None
    assert comm.rounds.reports() is None
    assert comm.share([1, "a"]) == [[1, "a"]]
    assert comm.gather(b"own") == [b"own"]
    comm.close()
    assert comm.closed


def test_a_rank_alone_reaches_nobody():
    comm = open_alone()
    with pytest.raises(AssertionError):
        comm.mail.post(0, b"mail")
    with pytest.raises(AssertionError):
        comm.transport.exchange([(0, torch.ones(1))], [])
