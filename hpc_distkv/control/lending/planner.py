"""Loans that pay although nobody is short of memory yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from hpc_distkv.control.lending.borrow import ANYWHERE
from hpc_distkv.control.lending.ledger import DebtLedger
from hpc_distkv.control.lending.links import Links
from hpc_distkv.control.messages.reports import Reports

CONSIDERED = 8
"""Debtors and creditors looked at in one plan: it costs the same in any cluster."""
SIZES = 8
"""Numbers of rBlocks tried for a pair: halves, from all that may move; and what a row lacks."""
LEAST_GAIN = 0.05
"""Share of the pair's throughput that a transfer must promise, so that plans do not oscillate."""
KEPT_PLANS = 4
"""Plans for which what was moved is left alone."""


class Transfer(NamedTuple):
    """`debtor` moves `blocks` rBlocks of its longest request to `creditor`."""

    debtor: int
    creditor: int
    blocks: int


class Load(NamedTuple):
    """One instance as the model sees it."""

    rows: float
    seats: float
    """Further rows it may run."""
    kv_tokens: float
    spare: int
    """rBlocks that nothing at the instance needs."""
    longest: int
    lacking: int
    """rBlocks that the next row lacks to begin."""
    row_blocks: float
    fixed: float
    per_token: float
    per_kv: float
    prompts: float = 0.0
    """Seconds of prompts that each output token brings along."""

    @property
    def time(self) -> float:
        """Seconds of a decode step: W(β)/f(β) + Σ S/g, linear in β; guests alone need no W."""
        fixed = self.fixed if self.rows else 0.0
        return fixed + self.per_token * self.rows + self.per_kv * self.kv_tokens

    def rate(self, exchange: float = 0.0) -> float:
        """Tokens per second if `exchange` seconds are added to every step."""
        if not self.rows:
            return 0.0
        return self.rows / (self.time + exchange + self.rows * self.prompts)


class Planner:
    """Infinite-LLM's greedy planner (arXiv 2401.02669v2) on fitted layer times.

    Debtors by ascending batch, creditors by ascending memory use, the debtor's longest request,
    the number of rBlocks with the best predicted gain in Σ β/T over both, where T has the prompts
    that each output token brings along. Rows that wait fill the room that a debtor gains; a row
    that waits there already begins when it has all that it lacks. A creditor lends what nothing
    there needs: room that its own rows could use is worth as much to them, and to clear it costs
    more than it brings. A fragment too small for any of them serves elsewhere.
    """

    def __init__(
        self, block_size: int, links: Links, exchange_seconds: Callable[[int], float]
    ) -> None:
        """`exchange_seconds`: link class → what an exchange over it adds to a step, as long as no
        instance has measured it in its steps."""
        self._size = block_size
        self._links = links
        self._exchange_seconds = exchange_seconds
        self._recent: dict[tuple[int, int], int] = {}
        """Pair → the last plan that moved anything between them."""
        self._plans = 0
        self._prompt_work = 0.0
        self._reports: Reports | None = None

    def plan(
        self,
        reports: Reports,
        ledger: DebtLedger,
        waiting: bool,
        reach: Callable[[int], int] = lambda debtor: ANYWHERE,
        prompt_work: float = 0.0,
    ) -> list[Transfer]:
        """The transfers that pay now, at most one per debtor. `waiting`: rows wait for a seat
        somewhere in the job; `reach`: debtor → the highest link class of its creditors;
        `prompt_work`: prompt tokens that have to be computed for each output token."""
        self._prompt_work = prompt_work if waiting else 0.0
        self._plans += 1
        self._recent = {p: n for p, n in self._recent.items() if self._plans - n < KEPT_PLANS}
        self._read(reports, waiting)
        if not self._means:
            return []
        known = _fitted(reports)
        use = 1 - reports["free"] / np.maximum(1, reports["capacity"])
        able = reports["promised"] > 0
        debtors = _least(reports["running"], (reports["longest"] > 0) & known)
        state: dict[int, Load] = {}
        transfers: list[Transfer] = []
        for debtor in debtors:
            if any(debtor == transfer.creditor for transfer in transfers):
                continue
            near = _least(use, able & (self._links.classes(debtor) <= reach(debtor)))
            for instance in (debtor, *near):
                state.setdefault(instance, self._load(instance))
            borrowing = {transfer.debtor for transfer in transfers}
            creditors = [creditor for creditor in near if creditor not in borrowing]
            if transfer := self._best_for(debtor, creditors, state, ledger):
                transfers.append(transfer)
                self._recent[debtor, transfer.creditor] = self._plans
                state[debtor], state[transfer.creditor] = _shift(
                    state[debtor], state[transfer.creditor], transfer.blocks, self._size
                )
        return transfers

    def pays(self, debtor: int, ledger: DebtLedger, reports: Reports) -> bool:
        """Whether the debtor's loans are worth what they cost: a recent plan made one, or the
        instances would be slower each for itself with the debtor's rBlocks at home."""
        if any(pair[0] == debtor for pair in self._recent):
            return True
        loans = ledger.creditors_of(debtor)
        self._read(reports, waiting=False)
        if not self._means:
            return False
        lent = {i: self._load(i) for i in (debtor, *loans)}
        exchange = max(self._exchange(debtor, creditor) for creditor in loans)
        home = {
            i: lent[i]._replace(kv_tokens=lent[i].kv_tokens - loans[i] * self._size) for i in loans
        }
        kv_tokens = lent[debtor].kv_tokens + sum(loans.values()) * self._size
        home[debtor] = lent[debtor]._replace(kv_tokens=kv_tokens)
        now = lent.pop(debtor).rate(exchange) + sum(load.rate() for load in lent.values())
        return now > sum(load.rate() for load in home.values())

    def _read(self, reports: Reports, waiting: bool) -> None:
        """Whatever has not stepped yet is taken to be like the mean of what has."""
        self._waiting = waiting
        if reports is self._reports:
            return
        self._reports = reports
        known = _fitted(reports)
        measured = reports["exchange"][reports["exchange"] > 0]
        self._measured = float(measured.mean()) if len(measured) else 0.0
        prompt_times = reports["prompt_time"][reports["prompt_time"] > 0]
        self._prompt_time = float(prompt_times.mean()) if len(prompt_times) else 0.0
        names = ("fixed", "per_token", "per_kv") if known.any() else ()
        self._means = {name: float(reports[name][known].mean()) for name in names}

    def _exchange(self, debtor: int, creditor: int) -> float:
        """Seconds that remote rBlocks add to a step of the debtor."""
        assert self._reports is not None
        assumed = self._exchange_seconds(self._links.between(debtor, creditor))
        return max(assumed, float(self._reports["exchange"][debtor]) or self._measured)

    def _may_lend(self, debtor: int, creditor: int, ledger: DebtLedger) -> bool:
        return (
            debtor != creditor
            and (creditor, debtor) not in self._recent
            and not ledger.closes_circle(debtor, creditor)
        )

    def _load(self, instance: int) -> Load:
        """The instance with the rows that its spare room is about to take in."""
        assert self._reports is not None
        row = {name: self._reports[name].item(instance) for name in _READ}
        model = {
            n: row[n] if row["fixed"] + row["per_token"] > 0 else mean
            for n, mean in self._means.items()
        }
        row_blocks = max(1.0, row["row_blocks"])
        lacking = row["lacking"]
        seats = row["seats"] if self._waiting else min(row["seats"], int(lacking > 0))
        # Where a row lacks room, what is promised is of no use to those that wait.
        new = 0.0 if lacking else min(seats, row["promised"] / row_blocks)
        return Load(
            rows=row["running"] + new,
            seats=seats - new,
            kv_tokens=row["kv_tokens"] + new * row_blocks * self._size,
            spare=int(row["promised"] - new * row_blocks),
            longest=row["longest"],
            lacking=lacking,
            row_blocks=row_blocks,
            prompts=self._prompt_work * self._prompt_time,
            **model,
        )

    def _best_for(
        self, debtor: int, creditors: list[int], state: dict[int, Load], ledger: DebtLedger
    ) -> Transfer | None:
        """The debtor's best transfer to one of `creditors`, if it pays."""
        gain, transfer = max(
            (
                self._best(debtor, creditor, state, ledger)
                for creditor in creditors
                if self._may_lend(debtor, creditor, ledger)
            ),
            default=(0.0, None),
        )
        return transfer if gain > LEAST_GAIN else None

    def _best(
        self, debtor: int, creditor: int, state: dict[int, Load], ledger: DebtLedger
    ) -> tuple[float, Transfer]:
        """The relative gain of the best number of rBlocks, and the transfer."""
        one, other = state[debtor], state[creditor]
        before = one.rate() + other.rate()
        exchange = 0.0 if ledger.creditors_of(debtor) else self._exchange(debtor, creditor)
        best = (0.0, Transfer(debtor, creditor, 0))
        most = self._most(one, other, sum(ledger.creditors_of(debtor).values()))
        sizes = {most >> halvings for halvings in range(SIZES if before else 0)}
        if before and one.lacking <= most:
            sizes.add(one.lacking)
        for blocks in sorted(sizes - {0}):
            with_less, with_more = _shift(one, other, blocks, self._size)
            gain = (with_less.rate(exchange) + with_more.rate()) / before - 1
            best = max(best, (gain, Transfer(debtor, creditor, blocks)))
        return best

    def _most(self, one: Load, other: Load, away: int) -> int:
        """Most rBlocks that may move: all that is elsewhere, `away` rBlocks by now, must be
        attended to while the debtor computes its own step."""
        hidden = one.time / (other.per_kv * self._size) if other.per_kv else float("inf")
        return max(0, int(min(one.longest, hidden - away, other.spare)))


_READ = (
    "running",
    "seats",
    "kv_tokens",
    "promised",
    "longest",
    "lacking",
    "row_blocks",
    "fixed",
    "per_token",
    "per_kv",
)


def _shift(one: Load, other: Load, blocks: int, size: int) -> tuple[Load, Load]:
    """Debtor and creditor after a transfer of `blocks` spare rBlocks of `size` tokens."""
    beyond = blocks - one.lacking
    first = 1 if one.lacking and beyond >= 0 else 0
    more = min(one.seats, first + max(0, beyond) / one.row_blocks)
    return (
        one._replace(
            rows=one.rows + more,
            seats=one.seats - more,
            kv_tokens=one.kv_tokens + (more * one.row_blocks - blocks) * size,
            longest=one.longest - blocks,
            lacking=max(0, -beyond),
        ),
        other._replace(kv_tokens=other.kv_tokens + blocks * size, spare=other.spare - blocks),
    )


def _fitted(reports: Reports) -> np.ndarray:
    """Which instances have a model of their steps."""
    fitted: np.ndarray = reports["fixed"] + reports["per_token"] > 0
    return fitted


def _least(values: np.ndarray, allowed: np.ndarray) -> list[int]:
    """The allowed instances with the least values, ascending."""
    candidates = np.flatnonzero(allowed)
    if len(candidates) > CONSIDERED:
        part = np.argpartition(values[candidates], CONSIDERED)[:CONSIDERED]
        candidates = candidates[part]
    order: list[int] = candidates[np.argsort(values[candidates], kind="stable")].tolist()
    return order
