"""rBlocks in the host's memory, against a model that knows nothing but what was written where."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hpc_distkv.memory.books.swap import SwapMove
from hpc_distkv.memory.rmanager import RManager
from hpc_distkv.start.capacity import mapped_memory

PROMPTS = ["", "aaa", "aab", "abb"]
"""A letter stands for the tokens of an rBlock."""
Content = tuple[str, int]


def keys_of(prompt: str) -> list[bytes]:
    return [prompt[: end + 1].encode() for end in range(len(prompt))]


class HostTier(RuleBasedStateMachine):
    """An instance whose requests come, grow, spill, are preempted, go on and end."""

    def __init__(self) -> None:
        super().__init__()
        self.rm = RManager(0, 8, host_blocks=7)
        self.home: dict[int, Content] = {}
        """Slot → what was written there last: a prefix, or a request and a place."""
        self.host: dict[int, Content] = {}
        self.prompts: dict[int, str] = {}
        self.swapped: dict[int, int] = {}
        """Preempted request → rBlocks it had computed."""
        self.out: list[SwapMove] = []
        self.back: list[SwapMove] = []
        self.going: dict[int, int] = {}
        self.newest = 0

    @property
    def running(self) -> list[int]:
        return [r for r in self.prompts if r in self.rm.tables and r not in self.going]

    @property
    def prefixes_move(self) -> bool:
        """Requests begin before the moves of a step are chosen, not while they are under way."""
        return any(move.key < 0 for move in (*self.out, *self.back))

    def content(self, request: int, index: int) -> Content:
        prompt = self.prompts[request]
        return (prompt[: index + 1] if index < len(prompt) else str(request)), index

    # -- what happens -----------------------------------------------------------------------------

    @precondition(lambda self: not self.prefixes_move and len(self.prompts) < 4)
    @rule(prompt=st.sampled_from(PROMPTS))
    def begin(self, prompt: str) -> None:
        if not self.rm.prefixes.awaited(keys_of(prompt)):
            self.newest += 1
            self.prompts[self.newest] = prompt
            self.rm.open(self.newest, keys_of(prompt))

    @precondition(lambda self: self.running and not self.out and not self.back)
    @rule(data=st.data(), blocks=st.integers(1, 3))
    def compute(self, data: st.DataObject, blocks: int) -> None:
        request = data.draw(st.sampled_from(self.running))
        blocks = min(blocks, max(0, self.rm.slots.usable))
        self.rm.grow(request, blocks)
        table = self.rm.tables[request]
        for index in range(table.blocks - blocks, table.blocks):
            self.home[table.slots[table.place(index)]] = self.content(request, index)
        self.rm.prefixes.seal(request, table.blocks)

    @precondition(lambda self: self.running and self.rm.swap.free)
    @rule(data=st.data(), at_once=st.booleans())
    def spill(self, data: st.DataObject, at_once: bool) -> None:
        """One rBlock of a request, or of what it shares."""
        moving = {(move.key, move.block) for move in self.out}
        blocks = [
            (key, index)
            for request in self.running
            for key, table in self.rm.parts(request).items()
            for index in table.indices
            if (key, index) not in moving
        ]
        if blocks:
            self.out.append(self.rm.swap.spill(*data.draw(st.sampled_from(blocks))))
            if at_once:
                self.arrive()

    @precondition(lambda self: self.running and self.rm.slots.usable > 0)
    @rule(data=st.data())
    def bring_home(self, data: st.DataObject) -> None:
        moving = {(move.key, move.block) for move in self.back}
        blocks = [
            (key, index)
            for request in self.running
            for key, table in self.rm.parts(request).items()
            for index in table.in_host
            if (key, index) not in moving
        ]
        if blocks:
            self.back.append(self.rm.swap.bring_home(*data.draw(st.sampled_from(blocks))))

    @precondition(lambda self: self.running and not self.out and not self.back)
    @rule(data=st.data(), unsealed=st.integers(0, 1), at_once=st.booleans())
    def preempt(self, data: st.DataObject, unsealed: int, at_once: bool) -> None:
        request = data.draw(st.sampled_from(self.running))
        table = self.rm.tables[request]
        sealed = max(table.start, table.blocks - unsealed)
        if self.rm.can_swap_out(request, sealed):
            self.out += self.rm.swap_out(request, sealed)
            self.going[request] = sealed
            if at_once:
                self.arrive()

    @rule()
    def arrive(self) -> None:
        """The bytes of all moves under way, and then their owners change."""
        slots = self.rm.swap.slots
        for move in self.out:
            self.host[slots[move.key][move.block]] = self.home[move.slot]
        for move in self.back:
            self.home[move.slot] = self.host[slots[move.key][move.block]]
        self.rm.swap.commit(self.out, self.back)
        for request in self.going:
            self.rm.finish_swap_out(request)
        self.swapped.update(self.going)
        self.out, self.back, self.going = [], [], {}

    @precondition(lambda self: self.swapped and not self.prefixes_move)
    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.swapped)))
        blocks, keys = self.swapped.pop(request), keys_of(self.prompts[request])
        lost = self.rm.prefixes.match(keys) < self.rm.swap.swapped[request]
        if lost and self.rm.prefixes.awaited(keys):
            self.swapped[request] = blocks
            return
        table = self.rm.resume(request, keys)
        assert request not in self.rm.swap.swapped
        if table.blocks < blocks:  # it had shared what is gone, or there was no room to use it
            assert not table.in_host

    @precondition(lambda self: self.swapped)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.swapped)))
        self.rm.swap.discard(request)
        del self.swapped[request], self.prompts[request]

    @precondition(lambda self: self.running and not self.out and not self.back)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.running))
        self.rm.close(request)
        del self.prompts[request]

    @precondition(lambda self: self.running and not self.out and not self.back)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """Where there are windows nothing is shared."""
        requests = [r for r in self.running if not self.prompts[r]]
        if requests:
            request = data.draw(st.sampled_from(requests))
            table = self.rm.tables[request]
            first = data.draw(st.integers(table.start, table.blocks))
            if first > table.start:
                self.rm.drop(request, first)

    # -- what always holds ------------------------------------------------------------------------

    @invariant()
    def every_slot_has_one_owner(self) -> None:
        self.rm.check()

    @invariant()
    def every_rblock_is_where_its_owner_says(self) -> None:
        slots = self.rm.swap.slots
        for request in self.running:
            for key, table in self.rm.parts(request).items():
                for index, slot in zip(table.indices, table.slots, strict=True):
                    assert self.home[slot] == self.content(request, index)
                for index in table.in_host:
                    assert self.host[slots[key][index]] == self.content(request, index)
        for request in self.swapped:
            for index, slot in slots[request].items():
                assert self.host[slot] == self.content(request, index)

    def teardown(self) -> None:
        if self.out or self.back:
            self.arrive()
        for request in self.running:
            self.rm.close(request)
        for request in self.swapped:
            self.rm.swap.discard(request)
        self.rm.check()
        assert (self.rm.slots.usable, self.rm.swap.free) == (8, 7)


TestHostTier = HostTier.TestCase
TestHostTier.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


def test_a_request_begins_anew_when_what_it_shared_is_gone():
    rm, keys = RManager(0, 4, host_blocks=4), keys_of("aa")
    for request in (1, 2):
        rm.open(request, keys)
        rm.grow(request, 2 if request == 1 else 1)
        rm.prefixes.seal(request, 2)
    assert rm.tables[2].start == 2
    moves = rm.swap_out(2, 3)
    assert [move.block for move in moves] == [2], "what 1 needs too is not copied"
    rm.swap.commit(moves, [])
    rm.finish_swap_out(2)
    rm.close(1)
    rm.open(3)
    rm.grow(3, 4)
    rm.close(3)
    assert rm.prefixes.match(keys) == 0
    table = rm.resume(2, keys)
    assert (table.blocks, rm.swap.free) == (0, 4)
    rm.check()


@pytest.mark.parametrize("lent", ["its own", "of its prefix"])
def test_what_has_rblocks_at_a_creditor_is_not_swapped_out(lent):
    rm, keys = RManager(0, 8, host_blocks=5), keys_of("aa")
    rm.open(1, keys)
    rm.grow(1, 4)
    rm.prefixes.seal(1, 4)
    rm.swap.commit([rm.swap.spill(1, 2)], [])
    assert rm.can_swap_out(1, 4)
    rm.borrower.credit_opened(1, 1)
    (prefix,) = rm.prefixes.chain(1)
    key, index = (1, 3) if lent == "its own" else (prefix.id, 0)
    rm.borrower.commit([rm.borrower.move_out(key, index, 1)], [])
    assert not rm.can_swap_out(1, 4)


def test_what_is_still_at_home_is_not_read_from_the_host():
    rm, keys = RManager(0, 6, host_blocks=4), keys_of("aaa")
    rm.open(1, keys)
    rm.grow(1, 4)
    rm.prefixes.seal(1, 4)
    moves = rm.swap_out(1, 4)
    assert [move.block for move in moves] == [0, 1, 2, 3]
    rm.swap.commit(moves, [])
    rm.finish_swap_out(1)
    rm.open(2)
    rm.grow(2, 4)
    table = rm.resume(1, keys)
    assert (table.start, table.in_host) == (2, [2, 3])
    assert rm.swap.free == 2
    rm.check()


def test_of_a_prefix_that_is_cut_each_part_keeps_what_it_has_in_the_host():
    rm = RManager(0, 8, host_blocks=4)
    rm.open(1, keys_of("aaa"))
    rm.grow(1, 3)
    rm.prefixes.seal(1, 3)
    (whole,) = rm.prefixes.chain(1)
    rm.swap.commit([rm.swap.spill(whole.id, 0), rm.swap.spill(whole.id, 2)], [])
    slots = rm.swap.slots[whole.id]
    rm.open(2, keys_of("aab"))
    first, rest = rm.prefixes.chain(1)
    assert (first.in_host, rest.in_host) == ([0], [2])
    assert rm.swap.slots == {first.id: {0: slots[0]}, rest.id: {2: slots[2]}}
    rm.check()


# -- a file in place of memory --------------------------------------------------------------------


def test_the_file_has_no_name_and_its_memory_can_be_used(tmp_path):
    memory = mapped_memory(1 << 20, tmp_path)
    memory.fill_(7)
    assert memory.shape == (1 << 20,)
    assert int(memory.sum()) == 7 << 20
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_on_the_disk_is_refused_at_once(tmp_path):
    with pytest.raises(OSError, match=r"No space left|too large"):
        mapped_memory(1 << 60, tmp_path)
    assert list(tmp_path.iterdir()) == []
