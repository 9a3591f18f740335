"""Loans that pay although nobody is short of memory yet."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hpc_distkv.control.round import Round

CONSIDERED = 8
"""Debtors and creditors looked at in one plan: it costs the same in any cluster."""
SIZES = 8
"""Numbers of rBlocks tried for a pair: halves, from all that may move; and what a request lacks."""
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
    """One instance as the performance model sees it."""

    rows: float
    """Query rows of a decode step: one for each request that runs."""
    seats: float
    """Further requests it may run."""
    kv_tokens: float
    spare: int
    """rBlocks that nothing at the instance needs."""
    longest: int
    lacking: int
    """rBlocks that the next request lacks to begin."""
    request_blocks: float
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


class Prediction:
    """The instances of one round as the performance model sees them. Those that have not stepped
    yet are taken to be like the mean of those that have."""

    def __init__(self, round: Round, block_size: int, prompt_work: float) -> None:
        """`prompt_work`: prompt tokens that have to be computed for each output token."""
        reports = round.reports
        self.round, self.size = round, block_size
        self.stepped: np.ndarray = reports.fixed + reports.per_token > 0
        """Which instances have a fitted model of their steps: bool `[instances]`."""
        self.known = bool(self.stepped.any())
        """Whether any has: otherwise nothing can be predicted."""
        coefficients = (reports.fixed, reports.per_token, reports.per_kv)
        self._means = [float(c[self.stepped].mean()) if self.known else 0.0 for c in coefficients]
        self._measured = _mean_of_known(reports.exchange)
        self._prompts = prompt_work * _mean_of_known(reports.prompt_time)

    def exchange(self, debtor: int, creditor: int) -> float:
        """Seconds that remote rBlocks add to a step of the debtor."""
        links = self.round.links
        assumed = links.exchange_seconds(links.between(debtor, creditor), 1)
        return max(assumed, float(self.round.reports.exchange[debtor]) or self._measured)

    def load(self, instance: int, waiting: bool) -> Load:
        """The instance with the requests that its spare room is about to take in. `waiting`:
        requests wait for a seat somewhere in the job."""
        reports = self.round.reports
        fixed, per_token = reports.fixed.item(instance), reports.per_token.item(instance)
        per_kv = reports.per_kv.item(instance)
        if not fixed + per_token > 0:
            fixed, per_token, per_kv = self._means
        request_blocks = max(1.0, reports.request_blocks.item(instance))
        lacking = reports.lacking.item(instance)
        seats, promised = reports.seats.item(instance), reports.promised.item(instance)
        if not waiting:
            seats = min(seats, int(lacking > 0))
        # Where a request lacks room, what is promised is of no use to those that wait.
        new = 0.0 if lacking else min(seats, promised / request_blocks)
        return Load(
            rows=reports.running.item(instance) + new,
            seats=seats - new,
            kv_tokens=reports.kv_tokens.item(instance) + new * request_blocks * self.size,
            spare=int(promised - new * request_blocks),
            longest=reports.longest.item(instance),
            lacking=lacking,
            request_blocks=request_blocks,
            fixed=fixed,
            per_token=per_token,
            per_kv=per_kv,
            prompts=self._prompts,
        )


class Planner:
    """Infinite-LLM's greedy planner (arXiv 2401.02669v2) on fitted layer times.

    Debtors by ascending batch, creditors by ascending memory use, the debtor's longest request,
    the number of rBlocks with the best predicted gain in Σ β/T over both, where T has the prompts
    that each output token brings along. Requests that wait fill the room that a debtor gains; one
    that waits there already begins when it has all that it lacks. A creditor lends what nothing
    there needs: room that its own requests could use is worth as much to them, and to clear it
    costs more than it brings. A fragment too small for any of them serves elsewhere.
    """

    def __init__(self, block_size: int) -> None:
        self._size = block_size
        self._recent: dict[tuple[int, int], int] = {}
        """Pair → the last plan that moved anything between them."""
        self._plans = 0
        self._prompt_work = 0.0
        """Of the last plan: prompt tokens for each output token."""
        self._model: Prediction | None = None
        """Of the last round."""

    def plan(self, round: Round, waiting: bool, prompt_work: float = 0.0) -> list[Transfer]:
        """The transfers that pay now, at most one per debtor. `waiting`: requests wait for a seat
        somewhere in the job; `prompt_work`: prompt tokens that have to be computed for each output
        token."""
        self._prompt_work = prompt_work if waiting else 0.0
        self._plans += 1
        self._recent = {p: n for p, n in self._recent.items() if self._plans - n < KEPT_PLANS}
        model = self._model = Prediction(round, self._size, self._prompt_work)
        if not model.known:
            return []
        reports = round.reports
        use = 1 - reports.free / np.maximum(1, reports.capacity)
        able = reports.promised > 0
        debtors = _least(reports.running, (reports.longest > 0) & model.stepped)
        state: dict[int, Load] = {}
        transfers: list[Transfer] = []
        for debtor in debtors:
            if any(debtor == transfer.creditor for transfer in transfers):
                continue
            near = _least(use, able & (round.links.classes(debtor) <= round.reach(debtor)))
            for instance in (debtor, *near):
                if instance not in state:
                    state[instance] = model.load(instance, waiting)
            borrowing = {transfer.debtor for transfer in transfers}
            creditors = [creditor for creditor in near if creditor not in borrowing]
            if transfer := self._best_for(debtor, creditors, state, model):
                transfers.append(transfer)
                self._recent[debtor, transfer.creditor] = self._plans
                state[debtor], state[transfer.creditor] = _shift(
                    state[debtor], state[transfer.creditor], transfer.blocks, self._size
                )
        return transfers

    def pays(self, round: Round, debtor: int) -> bool:
        """Whether the debtor's loans are worth what they cost: a recent plan made one, or the
        instances would be slower each for itself with the debtor's rBlocks at home."""
        if any(pair[0] == debtor for pair in self._recent):
            return True
        if self._model is None or self._model.round is not round:
            self._model = Prediction(round, self._size, self._prompt_work)
        model = self._model
        if not model.known:
            return False
        loans = round.ledger.creditors_of(debtor)
        lent = {i: model.load(i, waiting=False) for i in (debtor, *loans)}
        exchange = max(model.exchange(debtor, creditor) for creditor in loans)
        home = {
            i: lent[i]._replace(kv_tokens=lent[i].kv_tokens - loans[i] * self._size) for i in loans
        }
        kv_tokens = lent[debtor].kv_tokens + sum(loans.values()) * self._size
        home[debtor] = lent[debtor]._replace(kv_tokens=kv_tokens)
        now = lent.pop(debtor).rate(exchange) + sum(load.rate() for load in lent.values())
        return now > sum(load.rate() for load in home.values())

    def _best_for(
        self, debtor: int, creditors: list[int], state: dict[int, Load], model: Prediction
    ) -> Transfer | None:
        """The debtor's best transfer to one of `creditors`, if it pays."""
        gain, transfer = max(
            (
                self._best(debtor, creditor, state, model)
                for creditor in creditors
                if debtor != creditor
                and (creditor, debtor) not in self._recent
                and not model.round.ledger.closes_circle(debtor, creditor)
            ),
            default=(0.0, None),
        )
        return transfer if gain > LEAST_GAIN else None

    def _best(
        self, debtor: int, creditor: int, state: dict[int, Load], model: Prediction
    ) -> tuple[float, Transfer]:
        """The relative gain of the best number of rBlocks, and the transfer."""
        one, other = state[debtor], state[creditor]
        before = one.rate() + other.rate()
        lent = model.round.ledger.creditors_of(debtor)
        exchange = 0.0 if lent else model.exchange(debtor, creditor)
        best = (0.0, Transfer(debtor, creditor, 0))
        most = self._most(one, other, sum(lent.values()))
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


def _shift(one: Load, other: Load, blocks: int, size: int) -> tuple[Load, Load]:
    """Debtor and creditor after a transfer of `blocks` spare rBlocks of `size` tokens."""
    beyond = blocks - one.lacking
    first = 1 if one.lacking and beyond >= 0 else 0
    more = min(one.seats, first + max(0, beyond) / one.request_blocks)
    return (
        one._replace(
            rows=one.rows + more,
            seats=one.seats - more,
            kv_tokens=one.kv_tokens + (more * one.request_blocks - blocks) * size,
            longest=one.longest - blocks,
            lacking=max(0, -beyond),
        ),
        other._replace(kv_tokens=other.kv_tokens + blocks * size, spare=other.spare - blocks),
    )


def _mean_of_known(times: np.ndarray) -> float:
    """The mean of the times that are not 0; 0 if all are."""
    known = times[times > 0]
    return float(known.mean()) if len(known) else 0.0


def _least(values: np.ndarray, allowed: np.ndarray) -> list[int]:
    """The allowed instances with the least values, ascending."""
    candidates = np.flatnonzero(allowed)
    if len(candidates) > CONSIDERED:
        part = np.argpartition(values[candidates], CONSIDERED)[:CONSIDERED]
        candidates = candidates[part]
    order: list[int] = candidates[np.argsort(values[candidates], kind="stable")].tolist()
    return order
