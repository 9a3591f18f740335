"""A sequence without tokens behaves as one with tokens does."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from hpc_distkv.control.messages.requests import Request, Sampling, pack_tokens, unpack_tokens
from hpc_distkv.decide.sequence import TokenSequence
from hpc_distkv.simulate.sequence import SizedRequest, SizedSequence
from hpc_distkv.simulate.workload import TraceRow


def both(prompt: int, output: int) -> tuple[TokenSequence, SizedSequence]:
    real = Request(7, pack_tokens(range(prompt)), Sampling(max_tokens=output))
    return TokenSequence(real, 1.5), SizedSequence(
        SizedRequest.of(7, TraceRow(prompt, output)), 1.5
    )


def make(sequence: TokenSequence, token: int, now: float) -> None:
    """One more output token."""
    sequence.expect(0)
    sequence.learn(token, now)


def state(sequence: TokenSequence) -> dict[str, object]:
    names = ("id", "length", "remaining", "computed", "output_len", "final_len", "assigned_at")
    shown = {name: getattr(sequence, name) for name in names}
    shown["output_bytes"] = len(sequence.packed_output)
    shown["times"] = (sequence.first_token_at, sequence.last_token_at)
    shown["finish_reason"] = sequence.finish_reason()
    shown["prompt"] = sequence.request.prompt_len
    return shown


@given(st.integers(1, 50), st.integers(1, 8), st.data())
def test_it_counts_what_a_real_one_counts(prompt, output, data):
    real, sized = both(prompt, output)
    assert state(sized) == state(real)
    for token in range(output):
        computed = data.draw(st.integers(0, real.length))
        for sequence in (real, sized):
            sequence.computed = computed
            make(sequence, token, token + 2.0)
        assert state(sized) == state(real)
    assert sized.finish_reason() == "length"


@given(st.integers(1, 50), st.integers(2, 9), st.integers(0, 8))
def test_it_goes_on_elsewhere_as_a_real_one_does(prompt, output, made):
    pair = both(prompt, output)
    moved = []
    for sequence in pair:
        for token in range(min(made, output - 1)):
            make(sequence, token, 2.0)
        other = type(sequence)(sequence.request, sequence.assigned_at)
        other.restore(sequence.packed, sequence.length - 1)
        other.first_token_at, other.last_token_at = 3.0, 4.0
        moved.append(other)
    assert state(moved[1]) == state(moved[0])


def test_a_prompt_of_two_million_tokens_is_a_few_bytes_on_the_wire():
    sent = msgspec.msgpack.encode(SizedRequest.of(3, TraceRow(2_000_000, 500, 4, 9)))
    assert len(sent) < 60
    received = msgspec.msgpack.decode(sent, type=Request)
    assert unpack_tokens(received.prompt) == [2_000_000, 500, 4, 9]
    sequence = SizedSequence(received, 0.0)
    assert (sequence.id, sequence.length, sequence.final_len) == (3, 2_000_000, 2_000_499)


def test_it_may_end_before_its_limit():
    sequence = SizedSequence(SizedRequest.of(1, TraceRow(10, 2, limit=9)), 0.0)
    assert sequence.final_len == 10 + 9 - 1
    make(sequence, 0, 1.0)
    assert sequence.finish_reason() is None
    make(sequence, 0, 2.0)
    assert sequence.finish_reason() == "stop"
