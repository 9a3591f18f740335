"""Requests that share the rBlocks of equal beginnings, at home and lent, against a model that knows
nothing but the tokens: what a request reads is what its own prompt wrote, and what nobody reads is
free."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hpc_distkv.memory.loan import Guest, ProtocolError, Split
from hpc_distkv.memory.rmanager import RManager

HOME, CREDITOR = 0, 1
PROMPTS = ["aaaa", "aaab", "aab", "aabb", "abbb", "b", "ba", "bab", "babbbb", "babbba"]
"""A letter stands for the tokens of an rBlock."""


def keys_of(prompt: str) -> list[bytes]:
    return [prompt[: end + 1].encode() for end in range(len(prompt))]


class Sharing(RuleBasedStateMachine):
    """An instance whose requests come, grow, lend and go, and one creditor."""

    def __init__(self) -> None:
        super().__init__()
        self.rm, self.other = RManager(HOME, 9), RManager(CREDITOR, 6)
        self.bytes: dict[tuple[int, int], tuple[str, int]] = {}
        """(instance, slot) → what was written there last: a beginning, or a request and a place."""
        self.prompts: dict[int, str] = {}
        self.filled: dict[int, int] = {}
        """Request → rBlocks that are full."""
        self.newest = 0

    # -- what happens -----------------------------------------------------------------------------

    @rule(prompt=st.sampled_from(PROMPTS))
    def begin(self, prompt: str) -> None:
        keys = keys_of(prompt)
        if self.rm.prefixes.awaited(keys):
            here = self.rm.prefixes.match(keys)
            assert any(self.shared(prompt, r) > here for r in self.prompts)
            return
        self.newest += 1
        in_use = max((self.in_use(prompt, r) for r in self.prompts), default=0)
        assert self.rm.prefixes.in_use(keys) == in_use
        usable = self.rm.slots.usable
        table = self.rm.open(self.newest, keys)
        assert in_use <= table.start <= self.rm.prefixes.match(keys)
        assert self.rm.slots.usable == usable - (table.start - in_use)
        self.prompts[self.newest], self.filled[self.newest] = prompt, table.start
        self.tell()

    @precondition(lambda self: self.prompts)
    @rule(data=st.data(), blocks=st.integers(1, 3))
    def compute(self, data: st.DataObject, blocks: int) -> None:
        """A step that fills rBlocks; the request's output takes private ones after its prompt."""
        request = data.draw(st.sampled_from(sorted(self.prompts)))
        blocks = min(blocks, max(0, self.rm.slots.usable))
        self.rm.grow(request, blocks)
        table, prompt = self.rm.tables[request], self.prompts[request]
        for index in range(table.blocks - blocks, table.blocks):
            slot = table.slots[table.place(index)]
            own = prompt[: index + 1] if index < len(prompt) else str(request)
            self.bytes[HOME, slot] = own, index
        self.filled[request] += blocks
        self.rm.prefixes.seal(request, self.filled[request])

    @precondition(lambda self: self.prompts)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.prompts)))
        self.rm.close(request)
        del self.prompts[request], self.filled[request]

    @rule(blocks=st.integers(1, 3))
    def borrow(self, blocks: int) -> None:
        self.other.lender.promise(blocks)
        self.other.lender.settle({HOME: self.other.lender.promised})
        self.rm.borrower.credit_opened(CREDITOR, self.other.lender.open_credit(HOME))

    @precondition(lambda self: self.prompts and self.rm.borrower.credit)
    @rule(data=st.data())
    def lend(self, data: st.DataObject) -> None:
        parts = self.rm.parts(data.draw(st.sampled_from(sorted(self.prompts))))
        at_home = [(key, index) for key, table in parts.items() for index in table.indices]
        if not at_home:
            return
        self.tell()
        move = self.rm.borrower.move_out(*data.draw(st.sampled_from(at_home)), CREDITOR)
        (hosted,) = self.other.lender.host(HOME, [(move.key, move.block)])
        self.bytes[CREDITOR, hosted.slot] = self.bytes[HOME, move.slot]
        self.rm.borrower.commit([move], [])
        self.other.lender.commit([], [hosted])

    @rule(data=st.data())
    def recall(self, data: st.DataObject) -> None:
        lent = [(k, i) for k, t in self.rm.tables.items() for i in t.remote.get(CREDITOR, ())]
        if not lent or self.rm.slots.usable <= 0:
            return
        self.tell()
        move = self.rm.borrower.bring_home(*data.draw(st.sampled_from(lent)), CREDITOR)
        (back,) = self.other.lender.give_back(HOME, [(move.key, move.block)])
        self.bytes[HOME, move.slot] = self.bytes[CREDITOR, back.slot]
        self.rm.borrower.commit([], [move])
        self.other.lender.commit([back], [])

    @rule()
    def tell(self) -> None:
        """A header goes to the creditor."""
        news = self.rm.borrower.settle(CREDITOR)
        self.other.lender.split(HOME, news.splits)
        self.other.lender.evict(HOME, news.released)
        self.other.lender.take_back(HOME, news.returned)

    @precondition(lambda self: self.rm.slots.usable > 0)
    @rule()
    def host(self) -> None:
        """Somebody else's rBlock comes, and stays."""
        if self.rm.lender.lent < 2 and self.rm.lender.promise(1):
            self.rm.lender.settle({2: 1})
            self.rm.lender.open_credit(2)
            (hosted,) = self.rm.lender.host(2, [(99, self.rm.lender.lent)])
            self.bytes[HOME, hosted.slot] = "guest", 0
            self.rm.lender.commit([], [hosted])

    # -- what must hold ---------------------------------------------------------------------------

    def shared(self, prompt: str, other: int) -> int:
        """rBlocks at the beginning of `prompt` that another request's prompt has too."""
        pairs = enumerate(zip(prompt, self.prompts[other], strict=False))
        least = min(len(prompt), len(self.prompts[other]))
        return next((place for place, (a, b) in pairs if a != b), least)

    def in_use(self, prompt: str, other: int) -> int:
        return min(self.shared(prompt, other), self.sealed(other))

    def sealed(self, request: int) -> int:
        """rBlocks of its prompt that a request has given to all."""
        return self.rm.tables[request].start

    @invariant()
    def the_books_agree(self) -> None:
        self.rm.check()
        self.other.check()

    @invariant()
    def every_request_reads_what_its_own_prompt_wrote(self) -> None:
        self.tell()
        for request, prompt in self.prompts.items():
            seen: dict[int, tuple[str, int]] = {}
            for key, table in self.rm.parts(request).items():
                for index, slot in zip(table.indices, table.slots, strict=True):
                    seen[index] = self.bytes[HOME, slot]
                guest = self.other.lender.guests.get((HOME, key), Guest())
                assert sorted(guest.indices) == sorted(table.remote.get(CREDITOR, ()))
                for index, slot in zip(guest.indices, guest.slots, strict=True):
                    seen[index] = self.bytes[CREDITOR, slot]
            own = {i: prompt[: i + 1] if i < len(prompt) else str(request) for i in seen}
            assert seen == {index: (text, index) for index, text in own.items()}
            assert sorted(seen) == list(range(self.filled[request]))

    @invariant()
    def what_no_request_reads_is_free(self) -> None:
        read = {
            slot
            for request in self.prompts
            for table in self.rm.parts(request).values()
            for slot in table.slots
        }
        assert self.rm.slots.usable == self.rm.slots.num_blocks - len(read) - self.rm.lender.lent

    @invariant()
    def equal_beginnings_that_are_sealed_are_there_once(self) -> None:
        slots: dict[str, int] = {}
        for request in self.prompts:
            for prefix in self.rm.prefixes.chain(request):
                for index, slot in zip(prefix.indices, prefix.slots, strict=True):
                    text = self.prompts[request][: index + 1]
                    assert slots.setdefault(text, slot) == slot


TestSharing = Sharing.TestCase
TestSharing.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# -- the cache ------------------------------------------------------------------------------------


def run(rm: RManager, request: int, prompt: str) -> int:
    """Begin and compute a request; returns how many rBlocks it found."""
    found = rm.open(request, keys_of(prompt)).start
    rm.grow(request, len(prompt) - found)
    rm.prefixes.seal(request, len(prompt))
    rm.check()
    return found


def test_what_was_unused_longest_goes_first_and_its_last_rblocks_before_its_first():
    rm = RManager(HOME, 6)
    for request, prompt in enumerate(["aaa", "bbb", "aa"]):
        run(rm, request, prompt)
        rm.close(request)
    assert rm.slots.free == 6
    run(rm, 9, "c")
    assert [rm.prefixes.match(keys_of(prompt)) for prompt in ("aaa", "bbb")] == [2, 3]
    run(rm, 10, "dd")
    assert [rm.prefixes.match(keys_of(prompt)) for prompt in ("aaa", "bbb")] == [2, 1]
    run(rm, 11, "ee")
    assert [rm.prefixes.match(keys_of(prompt)) for prompt in ("aaa", "bbb")] == [1, 0]


def test_a_request_takes_no_more_of_the_cache_than_it_may_use():
    rm = RManager(HOME, 4)
    run(rm, 1, "aaaa")
    rm.close(1)
    assert rm.lender.promise(3) == 3
    assert run(rm, 2, "a") == 1
    assert rm.slots.usable == 0
    assert rm.open(3, keys_of("aaaa")).start == 1
    rm.check()


def test_a_request_waits_for_the_rblock_that_another_computes():
    rm = RManager(HOME, 8)
    rm.open(1, keys_of("aab"))
    assert rm.prefixes.awaited(keys_of("aa"))
    assert not rm.prefixes.awaited(keys_of("b"))
    rm.grow(1, 2)
    rm.prefixes.seal(1, 2)
    assert not rm.prefixes.awaited(keys_of("aa"))
    assert not rm.prefixes.awaited(keys_of("aac"))
    assert rm.prefixes.awaited(keys_of("aabc"))
    assert [rm.prefixes.coming(keys_of(prompt)) for prompt in ("aabc", "aac", "b")] == [3, 2, 0]
    rm.close(1)
    assert not rm.prefixes.awaited(keys_of("aabc"))


def test_what_is_lent_goes_as_soon_as_nobody_uses_it_with_all_that_continues_it():
    rm, other = RManager(HOME, 8), RManager(CREDITOR, 4)
    other.lender.promise(1)
    other.lender.settle({HOME: 1})
    rm.borrower.credit_opened(CREDITOR, other.lender.open_credit(HOME))
    run(rm, 1, "aab")
    run(rm, 2, "aac")
    trunk = rm.prefixes.chain(1)[0]
    move = rm.borrower.move_out(trunk.id, 0, CREDITOR)
    rm.borrower.commit([move], [])
    rm.close(1)
    assert rm.prefixes.match(keys_of("aab")) == 3
    rm.close(2)
    assert rm.prefixes.match(keys_of("aab")) == 0
    assert rm.borrower.settle(CREDITOR).released == [trunk.id]
    assert rm.slots.free == 8
    rm.check()


@pytest.mark.parametrize("split", [Split(-1, 2, -2), Split(-3, 0, -4), Split(-3, 1, -3)])
def test_a_split_of_what_is_not_there_is_refused(split):
    rm = RManager(CREDITOR, 4)
    rm.lender.promise(2)
    rm.lender.settle({HOME: 2})
    rm.lender.open_credit(HOME)
    rm.lender.commit([], rm.lender.host(HOME, [(-3, 0), (-3, 1)]))
    with pytest.raises(ProtocolError, match="instance 0 split prefix"):
        rm.lender.split(HOME, [split])


def test_what_was_used_last_stays_longest_however_often_it_was_used():
    rm = RManager(HOME, 3)
    for request, prompt in enumerate("ab"):
        rm.open(request, keys_of(prompt))
        rm.grow(request, 1)
        rm.prefixes.seal(request, 1)
    rm.close(0)
    rm.close(1)
    for request in range(2, 500):
        rm.open(request, keys_of("a"))
        rm.close(request)
    assert len(rm.prefixes._evictable) < 100
    rm.open(500)
    rm.grow(500, 2)
    assert [rm.prefixes.match(keys_of(prompt)) for prompt in "ab"] == [1, 0]
    rm.grow(500, 1)
    assert [rm.prefixes.match(keys_of(prompt)) for prompt in "ab"] == [0, 0]
    rm.check()
