"""Instances as the planner sees them, and Infinite-LLM's model of a transfer by brute force."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from hpc_distkv.control.lending.ledger import DebtLedger
from hpc_distkv.control.lending.links import Links
from hpc_distkv.control.lending.planner import Planner
from hpc_distkv.control.messages.reports import Reports
from hpc_distkv.control.round import Round

SIZE = 4
"""Tokens of an rBlock."""
EQUAL = {"fixed": 0.01, "per_token": 0.001, "per_kv": 1e-4}


def planner() -> Planner:
    return Planner(SIZE)


def round_of(reports: Reports, ledger: DebtLedger | None = None, exchange: float = 0.0) -> Round:
    """All on one node, with nothing lent but for `ledger`; `exchange`: seconds that one adds to a
    step."""
    links = Links([0] * len(reports), exchange=[(exchange, 0.0)])
    return Round(reports, ledger or DebtLedger(len(reports)), links)


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
        "lacking": draw(st.sampled_from((0, 0, 2, 25))),
        "request_blocks": draw(st.sampled_from((1.0, 4.0, 10.0))),
        "fixed": draw(st.sampled_from((0.01, 0.02))),
        "per_token": draw(st.sampled_from((0.0, 0.0005, 0.001))),
        "per_kv": draw(st.sampled_from((1e-5, 1e-4))),
    }


clusters = st.lists(instance(), min_size=2, max_size=4)


@dataclass
class Pair:
    """What becomes of two instances when spare rBlocks move from one to the other, by
    Infinite-LLM's model: a step takes W(β)/f(β) + Σ S/g, rows that wait fill all room, but for
    that which the next one lacks more than there is. Each token of output has `prompts` seconds of
    prompts come after it."""

    one: dict[str, float]
    other: dict[str, float]
    waiting: bool
    exchange: float
    prompts: float = 0.0

    def filled(self, one: dict[str, float]) -> tuple[float, float, float, int]:
        """(rows, seats, KV tokens, spare rBlocks) after waiting rows took their seats."""
        lacking = one.get("lacking", 0)
        if lacking or not self.waiting:
            seats = one["seats"] if self.waiting else min(one["seats"], 1 if lacking else 0)
            return one["running"], seats, one["kv_tokens"], int(one["promised"])
        new = min(one["seats"], one["promised"] / one["request_blocks"])
        blocks = new * one["request_blocks"]
        kv_tokens = one["kv_tokens"] + blocks * SIZE
        return one["running"] + new, one["seats"] - new, kv_tokens, int(one["promised"] - blocks)

    def time(self, one: dict[str, float], rows: float, kv_tokens: float) -> float:
        return one["fixed"] * (rows > 0) + one["per_token"] * rows + one["per_kv"] * kv_tokens

    def rate(self, one: dict[str, float], rows: float, kv_tokens: float, extra: float = 0) -> float:
        if not rows:
            return 0.0
        return 1 / ((self.time(one, rows, kv_tokens) + extra) / rows + self.prompts)

    def most(self) -> int:
        """As many as the debtor has, the creditor has to spare and the debtor's step hides."""
        rows, _, kv_tokens, _ = self.filled(self.one)
        _, _, _, spare = self.filled(self.other)
        hidden = self.time(self.one, rows, kv_tokens) / (self.other["per_kv"] * SIZE)
        return int(min(self.one["longest"], hidden, spare))

    def gain(self, blocks: int) -> float:
        rows, seats, kv_tokens, _ = self.filled(self.one)
        others, _, other_kv, _ = self.filled(self.other)
        lacking = self.one.get("lacking", 0)
        if blocks < lacking:
            more = 0.0
        else:
            more = (blocks - lacking) / self.one["request_blocks"] + (1 if lacking else 0)
        more = min(seats, more)
        less_kv = kv_tokens + (more * self.one["request_blocks"] - blocks) * SIZE
        more_kv = other_kv + blocks * SIZE
        after = self.rate(self.one, rows + more, less_kv, self.exchange)
        after += self.rate(self.other, others, more_kv)
        before = self.rate(self.one, rows, kv_tokens) + self.rate(self.other, others, other_kv)
        return after / before - 1


def uneven() -> list[dict[str, float]]:
    """One long row that fills an instance, and an instance of short rows that is half empty."""
    return [
        {"capacity": 100, "free": 0, "running": 1, "seats": 15, "kv_tokens": 400, "longest": 99},
        {"capacity": 100, "free": 60, "promised": 50, "running": 16, "kv_tokens": 160},
    ]
