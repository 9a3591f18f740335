from __future__ import annotations

import signal
import time

import pytest

from hpc_distkv.comm.waiter import StallError, Waiter
from hpc_distkv.comm.world import World


def waiter(stall_timeout: float) -> Waiter:
    return Waiter(World(0, (0, 0, 1), hosts=("a", "a", "b")), stall_timeout)


def test_a_stall_names_who_waits_for_whom():
    with pytest.raises(StallError) as stall:
        waiter(0.05).until(lambda: None, "headers of step 3", lambda: [2, 1, 2])
    assert str(stall.value) == (
        "rank 0 on a waits for rank 1 on a, rank 2 on b: headers of step 3: "
        "nothing moved for 0.05 s"
    )


def test_ranks_that_get_ready_may_take_longer():
    hurried, began = waiter(0.05), time.monotonic()
    with hurried.patient():
        assert hurried.until(lambda: time.monotonic() - began > 0.2 or None, "weights")
    with pytest.raises(StallError, match=r"nothing moved for 0\.05 s"):
        hurried.until(lambda: None, "a step")


def test_progress_restarts_the_clock():
    patient = waiter(0.1)
    began = time.monotonic()
    last = [began]

    def ready():
        now = time.monotonic()
        if now - last[0] > 0.05:
            last[0] = now
            patient.moved()
        return now - began > 0.4 or None

    assert patient.until(ready, "something slow")


def test_a_suspended_job_has_not_stalled(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    polls = []

    def ready():
        polls.append(now[0])
        now[0] += 3600 if len(polls) == 5 else 0.001
        return len(polls) > 20 or None

    assert waiter(5.0).until(ready, "the answer")


def test_signal_handlers_run_while_waiting():
    heard = []
    previous = signal.signal(signal.SIGALRM, lambda *_: heard.append(True))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        assert waiter(5.0).until(lambda: bool(heard) or None, "a signal")
    finally:
        signal.signal(signal.SIGALRM, previous)


def test_waiting_leaves_the_core_to_others():
    began, used = time.monotonic(), time.process_time()
    waiter(5.0).until(lambda: time.monotonic() - began > 0.5 or None, "half a second")
    assert time.process_time() - used < 0.1


def test_background_work_goes_on_while_waiting():
    busy = waiter(5.0)
    count = []
    busy.always(lambda: count.append(1))
    busy.until(lambda: len(count) >= 3 or None, "the background")
    assert len(count) >= 3
