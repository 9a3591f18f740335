"""A log tells what happens to a run, once each."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from hpc_distkv.comm.world import World
from hpc_distkv.observe.live.story import Story
from hpc_distkv.ranks.interrupt import Interrupt


@pytest.fixture
def job():
    return SimpleNamespace(
        input_bytes=1234,
        answered_before=7,
        failed_before=3,
        begun_rows=2,
        begun_tokens=50,
        total_rows=None,
        in_flight=4,
    )


@pytest.fixture
def manager():
    return SimpleNamespace(draining=False, reports=SimpleNamespace(drain=np.array([False, False])))


def told_by(interrupt: Interrupt) -> tuple[Story, list[str]]:
    told: list[str] = []
    world = World(0, (0, 1), hosts=("nid1", "nid2"))
    return Story(told.append, world, interrupt), told


def test_a_run_says_what_is_done_and_when_all_rows_are_read(job, manager):
    story, told = told_by(Interrupt())
    story.begin(job)
    story.look(job, manager)
    assert told == [
        "1,234 bytes of input; 10 rows were done before, 3 of them errors; "
        "2 rows were begun, with 50 output tokens"
    ]
    job.total_rows = 20
    for _ in range(3):
        story.look(job, manager)
    assert told[1:] == ["all 20 rows of the input are read, and 4 of them are left"]


def test_each_signal_is_told_with_its_time(job, manager):
    interrupt = Interrupt(90)
    story, told = told_by(interrupt)
    interrupt.ask(90, "SIGUSR2")
    manager.draining = True
    for _ in range(2):
        story.look(job, manager)
    interrupt.ask(10, "SIGTERM")
    story.look(job, manager)
    assert told == [
        "SIGUSR2: beginning nothing new, 90 s for what runs",
        "SIGTERM: beginning nothing new, 10 s for what runs",
    ]


@pytest.mark.parametrize(
    ("asking", "who"), [([False, True], "rank 1 on nid2"), ([False, False], "another rank")]
)
def test_rank_0_tells_of_a_signal_that_another_rank_got(job, manager, asking, who):
    story, told = told_by(Interrupt())
    manager.draining, manager.reports.drain = True, np.array(asking)
    for _ in range(2):
        story.look(job, manager)
    assert told == [f"{who} was asked to stop: beginning nothing new"]
