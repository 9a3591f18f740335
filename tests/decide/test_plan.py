"""Which queries of a step go where."""

from __future__ import annotations

from hpc_distkv.control.messages.requests import Request, Sampling, pack_tokens
from hpc_distkv.decide.plan import Query, Scheduled, remote_queries
from hpc_distkv.decide.sequence import TokenSequence
from hpc_distkv.memory.rmanager import RManager

BLOCK = 4


def row(number: int, computed: int, tokens: int) -> Scheduled:
    request = Request(number, pack_tokens(range(computed + tokens)), Sampling(1))
    sequence = TokenSequence(request, 0.0)
    sequence.computed = computed
    return Scheduled(sequence, tokens)


def test_queries_of_the_same_guests_stand_together_and_each_goes_once_to_a_creditor():
    rm = RManager(0, 20)
    for creditor in (5, 6):
        rm.borrower.credit_opened(creditor, 3)
    for number in range(4):
        rm.open(number, [b"a", b"ab"])
        rm.grow(number, 4 if number == 0 else 2)
        rm.prefixes.seal(number, 4)
    (trunk,) = rm.prefixes.chain(0)
    moves = [
        rm.borrower.move_out(trunk.id, 0, 5),
        rm.borrower.move_out(1, 2, 5),
        rm.borrower.move_out(2, 2, 6),
    ]
    rm.borrower.commit(moves, [])
    rows = [row(0, 15, 1), row(1, 15, 1), row(2, 12, 3), row(3, 14, 2)]
    assert remote_queries(rm, rows) == {
        5: [
            Query([trunk.id], 1, 15, 0),
            Query([trunk.id], 3, 12, 2),
            Query([trunk.id], 2, 14, 5),
            Query([1, trunk.id], 1, 15, 1),
        ],
        6: [Query([2], 3, 12, 2)],
    }


def test_rows_without_rblocks_elsewhere_ask_nobody():
    rm = RManager(0, 4)
    rm.open(0)
    rm.grow(0, 2)
    assert remote_queries(rm, [row(0, 3, 1)]) == {}
