"""Token by token, a text is the one that all tokens together have."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from panicking import PANICS, save_panicking
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models

from hpc_distkv.errors import ForeignError, foreign_code
from hpc_distkv.model.detokenizer import MOST_HELD, DecodingDetokenizer, Detokenizer
from hpc_distkv.model.errors import TooLongError
from hpc_distkv.model.tokenizer import Tokenizer

TEXTS = [
    "Plain words, and more of them.",
    "na\u00efve caf\u00e9 \u2014 \u201cquoted\u201d",
    "\u4f60\u597d\uff0c\u4e16\u754c",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 and \U0001f1eb\U0001f1f7",
    "  spaces\n\n\tand\ttabs  ",
    "e\u0301 combining, \u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "",
]


@pytest.fixture(scope="module")
def byte_level(demo_model: Path) -> Tokenizer:
    return Tokenizer(demo_model)


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """In the manner of Llama 2: words begin with a mark that becomes a space, but for the first;
    what is in no piece is spelled in bytes."""
    folder = tmp_path_factory.mktemp("fallback")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [mark + letter for letter in "abcdefghij" for mark in ("\u2581", "")] + ["\u2581"]
    fast = FastTokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>")
    )
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast.add_special_tokens(["<unk>", "<s>", "</s>"])
    fast.add_tokens(["\u2581\u2581\u2581"])
    fast.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def by_decoding(tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> Detokenizer:
    """As for a tokenizer whose pieces are not known to be bytes."""
    return DecodingDetokenizer(tokenizer.decode, prompt)


def grown(
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    prompt: Sequence[int] = (),
    begin: Callable[..., Detokenizer] = Tokenizer.detokenizer,
) -> str:
    """The text token by token; what is shown is never taken back."""
    text = begin(tokenizer, prompt)
    shown = ""
    for token in tokens:
        shown += text.push(token)
        assert shown == text.text
    assert begin(tokenizer, prompt).extend(tokens) == shown
    return shown


def characters(spelled: bytes) -> str:
    """The text of some bytes, one after the other, without half a character at the end."""
    for length in range(min(3, len(spelled)), 0, -1):
        if begins_a_character(spelled[-length:]):
            return spelled[:-length].decode(errors="replace")
    return spelled.decode(errors="replace")


@cache
def begins_a_character(begin: bytes) -> bool:
    """Whether some bytes more would make one character of it, or half a surrogate pair: by
    trying."""
    for length in (1, 2, 3):
        for rest in itertools.product((0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF), repeat=length):
            with contextlib.suppress(UnicodeDecodeError):
                if len((begin + bytes(rest)).decode(errors="surrogatepass")) == 1:
                    return True
    return False


@pytest.mark.parametrize("begin", [Tokenizer.detokenizer, by_decoding])
@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_back_byte_level(byte_level, text, begin):
    tokens = byte_level.encode(text)
    assert grown(byte_level, tokens, begin=begin) == text
    assert b"".join(map(byte_level.token_bytes, tokens)).decode() == text
    for cut in range(len(tokens)):
        prompt, output = tokens[:cut], tokens[cut:]
        if "\ufffd" not in byte_level.decode(prompt):
            assert byte_level.decode(prompt) + grown(byte_level, output, prompt, begin) == text


@pytest.mark.parametrize("begin", [Tokenizer.detokenizer, by_decoding])
@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_back_with_every_byte_a_token(byte_fallback, text, begin):
    tokens = [3 + byte for byte in text.encode()]
    assert grown(byte_fallback, tokens, [3 + 33], begin) == text
    assert b"".join(map(byte_fallback.token_bytes, tokens)).decode() == text


@pytest.mark.parametrize("begin", [Tokenizer.detokenizer, by_decoding])
def test_a_character_in_pieces_is_shown_when_it_is_whole(byte_level, begin):
    text = begin(byte_level)
    tokens = byte_level.encode("\U0001f9ff")
    assert len(tokens) > 1
    assert [text.push(token) for token in tokens] == [""] * (len(tokens) - 1) + ["\U0001f9ff"]


@pytest.mark.parametrize("begin", [Tokenizer.detokenizer, by_decoding])
def test_half_a_character_at_the_end_takes_no_whole_one_with_it(byte_level, byte_fallback, begin):
    tokens = byte_level.encode("a\U0001f9ff")[:-1]
    assert byte_level.decode(tokens).endswith("\ufffd")
    assert grown(byte_level, tokens, begin=begin) == "a"
    tokens = [3 + byte for byte in "\u00e9\u00e9\u00e9".encode()[:-1]]
    assert byte_fallback.decode(tokens) == "\ufffd" * 5
    assert grown(byte_fallback, tokens, begin=begin) == "\u00e9\u00e9"


def test_bytes_that_are_no_character_take_no_whole_one_with_them(byte_fallback):
    tokens = [3 + byte for byte in b"\xff\xc3\xa9\xc3\xc3\xa9\xff"]
    assert byte_fallback.decode(tokens) == "\ufffd" * 7
    assert grown(byte_fallback, tokens) == "\ufffd\u00e9\ufffd\u00e9\ufffd"


@pytest.mark.parametrize("begin", [Tokenizer.detokenizer, by_decoding])
def test_the_space_between_prompt_and_output_is_kept(byte_fallback, begin):
    a, b = byte_fallback._fast.token_to_id("\u2581a"), byte_fallback._fast.token_to_id("\u2581b")
    assert byte_fallback.decode([b]) == "b"
    assert grown(byte_fallback, [b, a], [a], begin) == " b a"
    assert grown(byte_fallback, [b, a], begin=begin) == "b a"
    assert grown(byte_fallback, [b, a], [1], begin) == "b a"  # <s> is no text.
    assert byte_fallback.token_bytes(b) == b" b"


@pytest.mark.parametrize("begin", [Tokenizer.detokenizer, by_decoding])
def test_skipped_special_tokens_within_a_text(byte_fallback, begin):
    a = byte_fallback._fast.token_to_id("\u2581a")
    assert grown(byte_fallback, [a, 2, a, 2, 2, a], [a], begin) == " a a a"
    assert grown(byte_fallback, [2] * 100 + [a] * 3, [a], begin).split() == ["a"] * 3
    shown = byte_fallback.detokenizer((), skip_special_tokens=False).extend([2, a])
    assert shown == byte_fallback.decode([2, a], skip_special_tokens=False) == "</s> a"


def test_added_tokens_are_spelled_as_the_decoder_does(byte_fallback):
    run = byte_fallback._fast.token_to_id("\u2581\u2581\u2581")  # As Gemma adds them.
    a = byte_fallback._fast.token_to_id("\u2581a")
    assert byte_fallback.token_bytes(run) == b"   "
    assert grown(byte_fallback, [a, run, a]) == byte_fallback.decode([a, run, a]) == "a    a"


def test_token_bytes_of_special_and_absent_tokens(byte_level, byte_fallback):
    end = byte_level.eos_token_id
    assert byte_level.token_bytes(end) == b"<|im_end|>"
    assert byte_level.token_bytes(10**6) == b""
    assert byte_fallback.token_bytes(3 + 0xE9) == b"\xe9"
    assert grown(byte_level, [10**6]) == ""


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_tokens_byte_level(byte_level, data):
    """Against the library's decoder, which sees all tokens at once."""
    ids = st.integers(0, byte_level._fast.get_vocab_size() - 1)
    odd = st.sampled_from([*byte_level.encode("\u4f60\U0001f9ff\u00e9"), *range(20)])
    tokens = data.draw(st.lists(ids | odd, max_size=30))
    prompt = data.draw(st.lists(ids | odd, max_size=8))
    whole = byte_level.decode([*tokens, *byte_level.encode(".")])
    shown = grown(byte_level, tokens, prompt)
    assert whole == shown + "." or (whole.endswith("\ufffd.") and whole[:-2].startswith(shown))
    spelled = b"".join(byte_level.token_bytes(t) for t in tokens if t not in byte_level._skipped)
    assert shown == characters(spelled)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 285), max_size=60), st.booleans())
def test_any_tokens_with_bytes_for_what_is_in_no_piece(byte_fallback, tokens, skip):
    spelled = b"".join(byte_fallback.token_bytes(t) for t in tokens if t > 2 or not skip)
    expected = characters(spelled).removeprefix(" ")
    text = byte_fallback.detokenizer((), skip)
    assert text.extend(tokens) == expected
    by_library = byte_fallback.decode(tokens, skip)
    if "\ufffd" not in by_library:
        assert by_library == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(3, 258), max_size=60))
def test_any_bytes_neither_fail_nor_stall_a_decoder(byte_fallback, tokens):
    text = by_decoding(byte_fallback)
    for token in tokens:
        text.push(token)
        assert len(text._held) < MOST_HELD


def test_a_panic_of_the_library_is_an_error_like_any_other(tmp_path, monkeypatch):
    monkeypatch.setenv("RUST_BACKTRACE", "0")
    save_panicking(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    with pytest.raises(BaseException, match="retry-limit") as panic:
        tokenizer.encode(PANICS)
    assert not isinstance(panic.value, Exception)
    with pytest.raises(ForeignError, match=r"PanicException: .*retry-limit"), foreign_code():
        raise panic.value


def test_a_text_of_far_too_many_tokens_is_hardly_read(byte_level):
    words = "the quick brown fox " * 10_000
    tokens = byte_level.encode(words)
    assert byte_level.encode(words, most=len(tokens)) == tokens
    with pytest.raises(TooLongError, match="of its 200000 characters"):
        byte_level.encode(words, most=100)
    blanks = " " * 200_000  # Dozens of characters a token.
    assert byte_level.encode(blanks, most=10_000) == byte_level.encode(blanks)
