"""Where an output ends: stop strings wherever tokens end, stop tokens, and the least length."""

from __future__ import annotations

from collections.abc import Sequence as Ids
from itertools import pairwise

import pytest
from decoding import Decoding
from hypothesis import given
from hypothesis import strategies as st

from hpc_distkv.control.messages.requests import (
    UNREADABLE,
    Request,
    Sampling,
    pack_tokens,
    unpack_tokens,
)
from hpc_distkv.decide.sequence import TokenSequence

PROMPT = list(b"prompt")
SPECIAL = 300


class Bytes(Decoding):
    """One token a byte; 300 is special."""

    def decode(self, ids: Ids[int], skip_special_tokens: bool = True) -> str:
        pieces = [
            b""
            if i == SPECIAL and skip_special_tokens
            else b"<|s|>"
            if i == SPECIAL
            else bytes([i])
            for i in ids
        ]
        return b"".join(pieces).decode(errors="replace")


class Pieces(Decoding):
    """Tokens are the pieces of a text, in order."""

    def __init__(self, pieces: Ids[str]) -> None:
        self.pieces = pieces

    def decode(self, ids: Ids[int], skip_special_tokens: bool = True) -> str:
        return "".join(self.pieces[i] for i in ids)


def run(output: Ids[int], decoder=None, **sampling) -> TokenSequence:
    """A sequence that makes `output`, until it ends."""
    settings = Sampling(**({"max_tokens": 99} | sampling))
    prompt = PROMPT if isinstance(decoder, Bytes) else [0]
    made = TokenSequence(Request(0, pack_tokens(prompt), settings), 0.0, decoder or Bytes())
    for token in output:
        made.expect(0)
        made.learn(token, 0.0)
        if made.finish_reason():
            return made
    return made


def ended(output: bytes | Ids[int], *stop: str, **sampling) -> tuple[str, int] | None:
    """(answer, output tokens) if a stop string ended the output."""
    made = run(list(output), Bytes(), stop=stop, **sampling)
    if made.finish_reason() != "stop":
        assert made.text_end is None
        return None
    whole = Bytes().decode(made.tokens[len(PROMPT) :], made.request.sampling.skip_special_tokens)
    return whole[: made.text_end], made.output_len


def test_the_output_ends_where_the_stop_string_is_complete():
    assert ended(b"one, two, three", "two") == ("one, ", 8)
    assert ended(b"one, two, three", "two", include_stop=True) == ("one, two", 8)
    assert ended(b"one, two, three", "four") is None
    assert ended(b"two", "two") == ("", 3)
    assert ended("día 是 fin".encode(), "是") == ("día ", 8)
    assert ended("día 是 fin".encode(), "é") is None


def test_the_prompt_does_not_count():
    assert ended(b"one", "t") is None
    assert ended(b"one", "ptone") is None


def test_of_several_the_first_complete_one_counts():
    assert ended(b"abcdef", "bcd", "c") == ("ab", 3)
    assert ended(b"abcdef", "bc", "c") == ("a", 3)
    assert ended(b"abcdef", "c", "bc", include_stop=True) == ("abc", 3)


def test_a_stop_string_that_ends_within_the_least_length_is_passed_over():
    assert ended(b"a.b.c", ".", min_tokens=1) == ("a", 2)
    assert ended(b"a.b.c", ".", min_tokens=2) == ("a.b", 4)
    assert ended(b"a.b.c", "a.", ".b", min_tokens=2) == ("a", 3)
    assert ended(b"a.b.c", "a.b.c", min_tokens=4) == ("", 5)
    assert ended(b"a.b.c", ".", min_tokens=4) is None


def test_special_tokens_are_text_only_if_they_are_not_skipped():
    output = [*b"ab", SPECIAL, *b"cd"]
    assert ended(output, "bc") == ("a", 4)
    assert ended(output, "bc", skip_special_tokens=False) is None
    assert ended(output, "<|s|>", skip_special_tokens=False) == ("ab", 3)


@given(
    st.text("ab\u00e9\u4f60", max_size=12),
    st.lists(st.text("ab\u00e9\u4f60", min_size=1, max_size=3), min_size=1, max_size=3),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_the_cut_depends_on_the_text_alone(text, stops, include, rng):
    """Against a search one character at a time, for any cut of the text into tokens."""
    answer = None
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            answer = text[: end if include else min(starts)]
            break
    cuts = sorted(rng.sample(range(len(text) + 1), rng.randint(0, len(text))))
    bounds = [0, *cuts, len(text)]
    pieces = ["", *(text[a:b] for a, b in pairwise(bounds))]
    decoder = Pieces(pieces)
    made = run(range(1, len(pieces)), decoder, stop=tuple(stops), include_stop=include)
    if answer is None:
        assert made.finish_reason() is None
    else:
        assert made.finish_reason() == "stop"
        assert decoder.decode(made.tokens)[: made.text_end] == answer
        before = decoder.decode(made.tokens[:-1])
        assert not any(stop in before for stop in stops), "it ended with the first token it could"


def test_stop_tokens_count_as_output():
    for include in (False, True):
        made = run([5, 6, 7, 8], stop_token_ids=(7,), include_stop=include)
        assert (made.finish_reason(), unpack_tokens(made.packed_output)) == ("stop", [5, 6, 7])
    made = run([5, 7], stop_token_ids=(7,), max_tokens=2)
    assert (made.finish_reason(), unpack_tokens(made.packed_output)) == ("stop", [5, 7])
    made = run([7, 7, 7], stop_token_ids=(7,), min_tokens=3)
    assert (made.finish_reason(), made.output_len) == ("stop", 3)
    made = run([5, 6], max_tokens=2)
    assert (made.finish_reason(), unpack_tokens(made.packed_output)) == ("length", [5, 6])


def test_logprobs_go_with_the_tokens_of_the_output():
    settings = Sampling(9, stop_token_ids=(7,), logprobs=0)
    made = TokenSequence(Request(0, pack_tokens([1]), settings), 0.0)
    for token in (5, 6, 7):
        made.expect(0)
        made.learn(token, 0.0, bytes([token] * 4))
    assert unpack_tokens(made.packed_output) == [5, 6, 7]
    assert made.packed_logprobs == b"".join(bytes([token] * 4) for token in (5, 6, 7))


class PanicException(BaseException):
    """As pyo3 names what a panic of Rust raises: no `Exception`."""


@pytest.mark.parametrize("error", [ValueError, PanicException, MemoryError])
def test_a_tokenizer_that_fails_ends_the_request_and_nothing_else(error):
    class Failing(Bytes):
        def decode(self, ids: Ids[int], skip_special_tokens: bool = True) -> str:
            if ord("c") in ids:
                raise error("no")
            return super().decode(ids, skip_special_tokens)

    made = run(b"abcd", Failing(), stop=("x",))
    assert (made.finish_reason(), unpack_tokens(made.packed_output)) == (UNREADABLE, [*b"abc"])
    prompt = Request(0, pack_tokens(b"c"), Sampling(9, stop=("x",)))
    made = TokenSequence(prompt, 0.0, Failing())
    made.expect(0)
    made.learn(97, 0.0)
    assert made.finish_reason() == UNREADABLE


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_process_is_no_fault_of_a_tokenizer(error):
    class Ending(Bytes):
        def decode(self, ids: Ids[int], skip_special_tokens: bool = True) -> str:
            raise error

    with pytest.raises(error):
        run(b"ab", Ending(), stop=("x",))


def test_a_sequence_that_moves_goes_on_as_if_it_had_stayed():
    settings = Sampling(99, stop=("xyz",), min_tokens=2, logprobs=0)
    request = Request(0, pack_tokens(PROMPT), settings)
    stayed = TokenSequence(request, 0.0, Bytes())
    for place, token in enumerate(b"a xxyzb"):
        moved = TokenSequence(request, 0.0, Bytes())
        moved.restore(stayed.packed, 3, bytes(stayed.logprobs or b""))
        for each in (stayed, moved):
            each.expect(0)
            each.learn(token, 0.0, bytes([place] * 4))
        assert moved.finish_reason() == stayed.finish_reason()
        assert moved.text_end == stayed.text_end
        assert moved.packed_logprobs == stayed.packed_logprobs
        if stayed.finish_reason():
            break
    assert (stayed.text_end, stayed.output_len) == (3, 6)


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(ValueError, match="no tokenizer"):
        TokenSequence(Request(0, pack_tokens([1]), Sampling(9, stop=("x",))), 0.0)
