"""The planner against brute force over all transfers, and on clusters that carry its plans out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from debt_graphs import MOST, debts_of, has_circle, ledger_of, reaches
from hypothesis import given
from hypothesis import strategies as st
from made_reports import read, report

from hpc_distkv.control.ledger import DebtLedger
from hpc_distkv.control.links import Links
from hpc_distkv.control.planner import CONSIDERED, KEPT_PLANS, LEAST_GAIN, Planner, Transfer

SIZE = 4
"""Tokens of an rBlock."""
EQUAL = {"fixed": 0.01, "per_token": 0.001, "per_kv": 1e-4}


def free(link_class: int) -> float:
    return 0.0


def planner(instances: int, exchange: Callable[[int], float] = free) -> Planner:
    return Planner(SIZE, Links([0] * instances), exchange)


@st.composite
def instance(draw: st.DrawFn) -> dict[str, float]:
    longest = draw(st.sampled_from((0, 3, 30, 100)))
    return {
        "capacity": 400,
        "free": 300,
        "promised": draw(st.integers(0, 60)),
        "running": draw(st.integers(1, 20)),
        "seats": draw(st.sampled_from((0, 5, 20))),
        "kv_tokens": longest * SIZE + draw(st.integers(0, 2000)),
        "longest": longest,
        "row_blocks": draw(st.sampled_from((1.0, 4.0, 10.0))),
        "fixed": draw(st.sampled_from((0.01, 0.02))),
        "per_token": draw(st.sampled_from((0.0, 0.0005, 0.001))),
        "per_kv": draw(st.sampled_from((1e-5, 1e-4))),
    }


clusters = st.lists(instance(), min_size=2, max_size=4)


@dataclass
class Pair:
    """What becomes of two instances when rBlocks move from one to the other, by Infinite-LLM's
    model: a step takes W(β)/f(β) + Σ S/g, rows that wait fill all room."""

    one: dict[str, float]
    other: dict[str, float]
    waiting: bool
    exchange: float

    def filled(self, one: dict[str, float]) -> tuple[float, float, float, int]:
        """(rows, seats, KV tokens, spare rBlocks) after waiting rows took their seats."""
        if not self.waiting:
            return one["running"], 0, one["kv_tokens"], int(one["promised"])
        new = min(one["seats"], one["promised"] / one["row_blocks"])
        blocks = new * one["row_blocks"]
        kv_tokens = one["kv_tokens"] + blocks * SIZE
        return one["running"] + new, one["seats"] - new, kv_tokens, int(one["promised"] - blocks)

    def time(self, one: dict[str, float], rows: float, kv_tokens: float) -> float:
        return one["fixed"] * (rows > 0) + one["per_token"] * rows + one["per_kv"] * kv_tokens

    def rate(self, one: dict[str, float], rows: float, kv_tokens: float, extra: float = 0) -> float:
        return rows / (self.time(one, rows, kv_tokens) + extra) if rows else 0.0

    def most(self) -> int:
        """As many as the debtor has, the creditor has room for and its own step hides."""
        rows, _, kv_tokens, _ = self.filled(self.one)
        others, _, _, spare = self.filled(self.other)
        hidden = self.time(self.one, rows, kv_tokens) / (self.other["per_kv"] * SIZE)
        room = spare + (others * self.other["row_blocks"] if self.waiting else 0)
        return int(min(self.one["longest"], hidden, room))

    def gain(self, blocks: int) -> float:
        rows, seats, kv_tokens, _ = self.filled(self.one)
        others, _, other_kv, spare = self.filled(self.other)
        more = min(seats, blocks / self.one["row_blocks"])
        fewer = min(others, max(0, blocks - spare) / self.other["row_blocks"])
        less_kv = kv_tokens + (more * self.one["row_blocks"] - blocks) * SIZE
        more_kv = other_kv + (blocks - fewer * self.other["row_blocks"]) * SIZE
        after = self.rate(self.one, rows + more, less_kv, self.exchange)
        after += self.rate(self.other, others - fewer, more_kv)
        before = self.rate(self.one, rows, kv_tokens) + self.rate(self.other, others, other_kv)
        return after / before - 1


@given(clusters, st.booleans(), st.sampled_from((0.0, 0.002)))
def test_the_first_debtors_transfer_is_about_as_good_as_any(rows, waiting, exchange):
    """Debtors come by ascending batch. Only halves of what may move are tried: no transfer of
    another size promises more than 2.5 times as much."""
    transfers = planner(len(rows), lambda _: exchange).plan(
        read(*[report(**row) for row in rows]), DebtLedger(len(rows)), waiting
    )
    able = [i for i, row in enumerate(rows) if row["longest"]]
    if not able:
        assert transfers == []
        return
    debtor = min(able, key=lambda i: (rows[i]["running"], i))
    pairs = {
        i: Pair(rows[debtor], row, waiting, exchange)
        for i, row in enumerate(rows)
        if i != debtor and (waiting or row["promised"])
    }
    best = max((p.gain(x) for p in pairs.values() for x in range(1, p.most() + 1)), default=0.0)
    halves = [pair.gain(most) for pair in pairs.values() if (most := pair.most()) > 0]
    halves += [pair.gain(most // 2) for pair in pairs.values() if (most := pair.most()) > 1]
    chosen = 0.0
    for _, creditor, blocks in [t for t in transfers if t.debtor == debtor]:
        assert 0 < blocks <= pairs[creditor].most()
        chosen = pairs[creditor].gain(blocks)
        assert chosen > LEAST_GAIN * 0.999
        assert chosen >= max(halves) - 1e-5
    assert chosen >= 0.4 * best - LEAST_GAIN


@given(clusters, st.booleans())
def test_transfers_hide_behind_the_debtors_step(rows, waiting):
    """A debtor gives once in a plan, and before it takes anything its step is as reported."""
    transfers = planner(len(rows)).plan(
        read(*[report(**row) for row in rows]), DebtLedger(len(rows)), waiting
    )
    assert len({t.debtor for t in transfers}) == len(transfers)
    if transfers:
        debtor, creditor, blocks = transfers[0]
        pair = Pair(rows[debtor], rows[creditor], waiting, 0.0)
        own_rows, _, kv_tokens, _ = pair.filled(rows[debtor])
        own_time = pair.time(rows[debtor], own_rows, kv_tokens)
        assert blocks * SIZE * rows[creditor]["per_kv"] <= own_time * (1 + 1e-6)


@given(st.lists(instance(), min_size=MOST, max_size=MOST), debts_of(MOST), st.booleans())
def test_no_transfer_closes_a_circle(rows, debts, waiting):
    reports = read(*[report(**row) for row in rows])
    transfers = planner(MOST).plan(reports, ledger_of(MOST, debts), waiting)
    assert not any(reaches({*debts}, t.creditor, t.debtor) for t in transfers)
    pairs = {(t.debtor, t.creditor) for t in transfers}
    assert not any((creditor, debtor) in pairs for debtor, creditor in pairs)


@pytest.mark.xfail(strict=True, reason="a plan looks at the debts that are there, not at its own")
def test_no_plan_is_a_circle_of_its_own():
    same = {"capacity": 400, "free": 300, "running": 1, "fixed": 0.01, "per_kv": 1e-5}
    rows = [
        report(**same, seats=5, kv_tokens=120, longest=30, row_blocks=4),
        report(**same, promised=8, kv_tokens=12, longest=3, row_blocks=1),
        report(**same, kv_tokens=120, longest=30, row_blocks=1),
    ]
    transfers = planner(3).plan(read(*rows), DebtLedger(3), waiting=True)
    assert not has_circle({(t.debtor, t.creditor) for t in transfers})


# -- by hand ----------------------------------------------------------------------------------


def uneven() -> list[dict[str, float]]:
    """One long row that fills an instance, and an instance of short rows that is half empty."""
    return [
        {"capacity": 100, "free": 0, "running": 1, "seats": 15, "kv_tokens": 400, "longest": 99},
        {"capacity": 100, "free": 60, "promised": 50, "running": 16, "kv_tokens": 160},
    ]


def plan(rows: list[dict[str, float]], waiting: bool = True, **others) -> list[Transfer]:
    reports = read(*[report(**{"row_blocks": 2.5} | EQUAL | row) for row in rows])
    return planner(len(rows), **others).plan(reports, DebtLedger(len(rows)), waiting)


def test_an_uneven_pair_moves_the_long_row_to_where_there_is_room():
    """Waiting rows take the room: 15 seats of 2.5 rBlocks. The first size tried that gives as many
    is 49 of the 50 that are spare, and the 25 that still leave seats empty gain less."""
    (transfer,) = plan(uneven())
    assert transfer[:2] == (0, 1)
    assert 15 * 2.5 <= transfer.blocks <= 50


def test_without_rows_that_wait_room_is_worth_only_the_time_of_attention():
    """With 50 rBlocks less a step of 400 KV tokens takes 0.02 s less, and one elsewhere as much
    more. That is worth it if 10 rows wait for the one and 1 row for the other: 10/0.06 + 1/0.0114
    < 10/0.04 + 1/0.0314; not if 16 rows wait for the other."""
    assert plan(uneven(), waiting=False) == []
    rows = uneven()
    rows[0] |= {"running": 10}
    rows[1] |= {"running": 1, "kv_tokens": 4}
    assert plan(rows, waiting=False) == [Transfer(0, 1, 50)]


def test_instances_that_are_alike_move_nothing():
    alike = {"capacity": 100, "free": 20, "promised": 10, "running": 8, "seats": 8}
    assert plan([alike | {"kv_tokens": 320, "longest": 10}] * 4, waiting=False) == []
    full = alike | {"free": 0, "promised": 0, "kv_tokens": 400, "longest": 10}
    assert plan([full] * 4) == []


def test_a_debtor_without_free_seats_gains_nothing_by_room():
    rows = uneven()
    rows[0] |= {"running": 16, "seats": 0, "per_kv": 1e-6}
    rows[1] |= {"per_kv": 1e-6}
    assert plan(rows) == []


def test_an_exchange_that_costs_more_than_it_brings_is_not_made():
    assert plan(uneven(), exchange=lambda _: 0.0) != []
    assert plan(uneven(), exchange=lambda _: 1.0) == []


def test_before_anybody_has_stepped_nothing_is_planned():
    assert plan([row | dict.fromkeys(EQUAL, 0.0) for row in uneven()]) == []


def test_an_instance_that_has_not_stepped_may_be_a_creditor():
    rows = uneven()
    rows[1] |= dict.fromkeys(EQUAL, 0.0) | {"running": 0, "kv_tokens": 0, "free": 100}
    (transfer,) = plan(rows)
    assert transfer[:2] == (0, 1)


def test_the_debtor_with_the_smallest_batch_comes_first():
    rows = [uneven()[0] | {"running": 3}, uneven()[0], uneven()[1]]
    transfers = plan(rows)
    assert transfers[0][:2] == (1, 2)


def test_a_plan_looks_at_a_few_instances_however_many_there_are():
    rows = [uneven()[i % 2] for i in range(60)]
    transfers = plan(rows)
    assert 0 < len(transfers) <= CONSIDERED
    assert len({t.creditor for t in transfers}) <= CONSIDERED


# -- over time --------------------------------------------------------------------------------


@dataclass
class Site:
    """An instance of a cluster that carries plans out: short rows fill what is free."""

    capacity: int
    row: int
    """rBlocks of a short row."""
    long: int
    """rBlocks of its long row that are at home; 0: it has none."""
    seats: int
    hosted: int = 0
    short: int = 0

    @property
    def room(self) -> int:
        return self.capacity - self.long - self.hosted - self.short * self.row

    @property
    def rows(self) -> int:
        return self.short + (self.long > 0)

    @property
    def kv_tokens(self) -> int:
        return (self.capacity - self.room) * SIZE

    @property
    def rate(self) -> float:
        time = EQUAL["fixed"] + EQUAL["per_token"] * self.rows + EQUAL["per_kv"] * self.kv_tokens
        return self.rows / time

    def fill(self) -> None:
        self.short = min(self.seats - (self.long > 0), self.short + self.room // self.row)

    def host(self, blocks: int) -> None:
        while self.room < blocks:
            self.short -= 1
        self.hosted += blocks

    def fields(self) -> dict[str, float]:
        return {
            "capacity": self.capacity,
            "free": self.room,
            "promised": self.room,
            "running": self.rows,
            "seats": self.seats - self.rows,
            "kv_tokens": self.kv_tokens,
            "longest": max(0, self.long - 1),
            "row_blocks": self.row,
        }


sites = st.builds(
    Site,
    capacity=st.just(128),
    row=st.sampled_from((2, 4, 8)),
    long=st.sampled_from((0, 0, 60, 120)),
    seats=st.sampled_from((8, 16, 64)),
)


@given(st.lists(sites, min_size=2, max_size=4))
def test_plans_come_to_an_end_never_turn_back_and_leave_the_cluster_no_slower(cluster):
    for site in cluster:
        site.fill()
    before = sum(site.rate for site in cluster)
    ledger, under_test, moved = DebtLedger(len(cluster)), planner(len(cluster)), set()
    for _ in range(5 * KEPT_PLANS):
        reports = read(*[report(**site.fields() | EQUAL) for site in cluster])
        transfers = under_test.plan(reports, ledger, waiting=True)
        for debtor, creditor, blocks in transfers:
            cluster[creditor].host(blocks)
            cluster[debtor].long -= blocks
            ledger.grant(debtor, creditor, blocks)
            moved.add((debtor, creditor))
        for site in cluster:
            site.fill()
    assert transfers == []
    assert not any((creditor, debtor) in moved for debtor, creditor in moved)
    assert sum(site.rate for site in cluster) >= before * 0.98


# -- whether loans pay ------------------------------------------------------------------------


def lent(rows: list[dict[str, float]], blocks: int = 20) -> tuple[DebtLedger, object]:
    ledger = DebtLedger(2)
    ledger.grant(0, 1, blocks)
    return ledger, read(*[report(**EQUAL | row) for row in rows])


def test_a_loan_pays_while_it_frees_the_larger_batch():
    """At home 20 rBlocks cost 80 tokens · 0.1 ms = 8 ms of a step. With 10 rows here and 1 there
    that is more than the exchange takes; the other way round it is less."""
    many, few = {"running": 10, "kv_tokens": 100}, {"running": 1, "kv_tokens": 180}
    ledger, reports = lent([many, few])
    assert planner(2).pays(0, ledger, reports)
    assert not planner(2, lambda _: 0.1).pays(0, ledger, reports)
    ledger, reports = lent([few | {"kv_tokens": 100}, many | {"kv_tokens": 180}])
    assert not planner(2).pays(0, ledger, reports)


def test_a_loan_that_was_just_planned_is_left_alone():
    under_test = planner(2)
    reports = read(*[report(**{"row_blocks": 2.5} | EQUAL | row) for row in uneven()])
    assert under_test.plan(reports, DebtLedger(2), waiting=True)
    few_and_many = [{"running": 1, "kv_tokens": 100}, {"running": 10, "kv_tokens": 180}]
    ledger, later = lent(few_and_many)
    for _ in range(KEPT_PLANS):
        assert under_test.pays(0, ledger, later)
        under_test.plan(read(report(), report()), DebtLedger(2), waiting=False)
    assert not under_test.pays(0, ledger, later)
