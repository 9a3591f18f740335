"""What the scheduler does when memory is short."""

from __future__ import annotations

import pytest

from hpc_distkv.control.messages import NOBODY, Request, Sampling, pack_tokens
from hpc_distkv.engine.config import EngineConfig, OptionError
from hpc_distkv.engine.scheduler import Scheduler
from hpc_distkv.engine.sequence import Sequence
from hpc_distkv.memory.rmanager import RManager

BLOCK = 4


def make(num_blocks: int = 100, lending: bool = False, **limits: int) -> Scheduler:
    sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 16} | limits
    config = EngineConfig(num_blocks=num_blocks, block_size=BLOCK, lending=lending, **sizes)
    scheduler = Scheduler(RManager(0, num_blocks), config)
    scheduler.rm = scheduler._rm
    return scheduler


def add(scheduler: Scheduler, number: int, prompt: int, max_tokens: int = 8) -> Sequence:
    request = Request(number, pack_tokens(range(prompt)), Sampling(max_tokens=max_tokens))
    sequence = Sequence(request, assigned_at=0.0)
    scheduler.add(sequence)
    return sequence


def step(scheduler: Scheduler) -> dict[int, int]:
    """One step as the worker does it, with token 0 sampled; request → tokens computed."""
    plan = scheduler.plan()
    scheduler.rm.commit()
    for sequence, tokens in plan.rows:
        sequence.computed += tokens
        if not sequence.remaining:
            sequence.tokens.append(0)
            if sequence.finish_reason:
                scheduler.finish(sequence)
    scheduler.rm.check()
    return {sequence.id: tokens for sequence, tokens in plan.rows}


def test_decodes_go_first_and_prefills_fill_the_budget():
    scheduler = make()
    add(scheduler, 0, prompt=3)
    assert step(scheduler) == {0: 3}
    add(scheduler, 1, prompt=40)
    add(scheduler, 2, prompt=5)
    assert step(scheduler) == {0: 1, 1: 15}
    assert step(scheduler) == {0: 1, 1: 15}
    assert step(scheduler) == {0: 1, 1: 10, 2: 5}
    assert step(scheduler) == {0: 1, 1: 1, 2: 1}


def test_rows_beyond_the_seats_wait():
    scheduler = make(max_num_seqs=2)
    for number in range(3):
        add(scheduler, number, prompt=2, max_tokens=2)
    assert step(scheduler) == {0: 2, 1: 2}
    assert step(scheduler) == {0: 1, 1: 1}
    assert step(scheduler) == {2: 2}


def test_the_youngest_gives_way_and_is_computed_again():
    scheduler = make(num_blocks=5)
    add(scheduler, 0, prompt=7, max_tokens=9)
    add(scheduler, 1, prompt=7, max_tokens=9)
    computed = {0: 0, 1: 0}
    for _ in range(60):
        for request, tokens in step(scheduler).items():
            computed[request] += tokens
    assert scheduler.preemptions == 1
    assert not scheduler.running
    assert not scheduler.waiting
    assert computed[0] == 15
    assert computed[1] > 15


def test_a_row_waits_until_all_running_prompts_have_room():
    scheduler = make(num_blocks=10)
    add(scheduler, 0, prompt=30)
    add(scheduler, 1, prompt=20)
    step(scheduler)
    assert [sequence.id for sequence in scheduler.running] == [0]


def test_a_row_alone_is_admitted_beyond_the_pool_and_asks_for_what_it_lacks():
    scheduler = make(num_blocks=4, lending=True)
    add(scheduler, 0, prompt=100)
    assert step(scheduler) == {0: 16}
    demand = scheduler.demand()
    assert demand.wanted >= 25 - 4
    assert demand.wanted_for == 0
    assert demand.lendable == 0


def test_it_is_starved_only_when_nobody_will_lend():
    scheduler = make(num_blocks=4, lending=True)
    add(scheduler, 0, prompt=100)
    step(scheduler)
    assert step(scheduler) == {}
    assert not scheduler.demand().starved
    scheduler.answered(asked=21, granted=0, admit_before=NOBODY)
    assert step(scheduler) == {}
    assert scheduler.demand().starved


def test_nobody_younger_than_a_starved_request_is_admitted_and_its_room_is_lendable():
    scheduler = make(num_blocks=10, lending=True)
    scheduler.answered(asked=0, granted=0, admit_before=3)
    add(scheduler, 5, prompt=8)
    assert step(scheduler) == {}
    assert scheduler.demand().lendable == 10
    add(scheduler, 2, prompt=8)
    assert step(scheduler) == {2: 8}


def test_credit_is_used_for_the_oldest_rblocks_of_the_longest_row():
    scheduler = make(num_blocks=6, lending=True)
    add(scheduler, 0, prompt=40)
    step(scheduler)
    scheduler.rm.credit_opened(3, 8)
    plan = scheduler.plan()
    assert {(m.request, m.peer) for m in plan.moves} == {(0, 3)}
    assert [m.block for m in plan.moves] == list(range(len(plan.moves)))
    assert len(plan.moves) == 4, "all that is sealed may go"


def test_credit_that_is_not_needed_is_returned():
    scheduler = make(num_blocks=50, lending=True)
    scheduler.rm.credit_opened(3, 8)
    assert scheduler.demand().wanted == 0
    assert scheduler.rm.settle_debt(3) == ([], 8)


def test_a_victim_of_another_instances_row_keeps_its_age_when_it_comes_back():
    scheduler = make(num_blocks=5)
    for number in (3, 5):
        add(scheduler, number, prompt=4, max_tokens=12)
    step(scheduler)
    scheduler.give_way(3)
    step(scheduler)
    assert [sequence.id for sequence in scheduler.running] == [3, 5]
    for _ in range(5):
        step(scheduler)
    assert 3 in [sequence.id for sequence in scheduler.running], "the younger one gave way"


def test_room_for_a_first_chunk_is_not_lent_unless_somebody_starves():
    scheduler = make(num_blocks=40, lending=True)
    assert 0 < scheduler.demand().lendable < 40
    scheduler.answered(asked=0, granted=0, admit_before=0)
    assert scheduler.demand().lendable == 40


def test_an_instance_whose_pool_is_full_of_guests_takes_no_rows():
    scheduler = make(num_blocks=8, lending=True)
    scheduler.rm.promise(8)
    scheduler.rm.settle({1: 8})
    assert scheduler.room() == (0, 0)


@pytest.mark.parametrize(
    "sizes", [{"num_blocks": 0}, {"num_blocks": 4, "max_num_batched_tokens": 0}]
)
def test_sizes_that_cannot_work_are_refused(sizes):
    with pytest.raises(OptionError):
        EngineConfig(**sizes)
