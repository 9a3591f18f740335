"""Token by token, a text is the one that all tokens together have."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models

from hpc_distkv.model.detokenizer import MOST_HELD, Detokenizer, text_after, text_before
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
    fast.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def grown(tokenizer: Tokenizer, tokens: list[int], prompt: list[int] | None = None) -> str:
    """The text token by token; what is shown is never taken back, and never half a character."""
    text = Detokenizer(tokenizer.decode, prompt or [])
    shown = ""
    for token in tokens:
        new = text.push(token)
        shown += new
        assert shown == text.text
        assert "\ufffd" not in new or len(tokens) > MOST_HELD or "\ufffd" in text.finish()
    whole = text.finish()
    assert whole.startswith(shown)
    return whole


@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_back_byte_level(byte_level, text):
    tokens = byte_level.encode(text)
    assert grown(byte_level, tokens) == text
    assert b"".join(map(byte_level.token_bytes, tokens)).decode() == text
    for cut in range(len(tokens)):
        prompt, output = tokens[:cut], tokens[cut:]
        if "\ufffd" not in byte_level.decode(prompt):
            assert byte_level.decode(prompt) + grown(byte_level, output, prompt) == text


@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_back_with_every_byte_a_token(byte_fallback, text):
    tokens = [3 + byte for byte in text.encode()]
    assert grown(byte_fallback, tokens, [3 + 33]) == text
    assert b"".join(map(byte_fallback.token_bytes, tokens)).decode() == text


def test_a_character_in_pieces_is_shown_when_it_is_whole(byte_level):
    text = Detokenizer(byte_level.decode)
    tokens = byte_level.encode("\U0001f9ff")
    assert len(tokens) > 1
    assert [text.push(token) for token in tokens] == [""] * (len(tokens) - 1) + ["\U0001f9ff"]


def test_an_output_that_ends_within_a_character_says_so(byte_level):
    tokens = byte_level.encode("a\U0001f9ff")[:-1]
    assert grown(byte_level, tokens) == byte_level.decode(tokens)
    assert byte_level.decode(tokens).endswith("\ufffd")


def test_the_space_between_prompt_and_output_is_kept(byte_fallback):
    a, b = byte_fallback._fast.token_to_id("\u2581a"), byte_fallback._fast.token_to_id("\u2581b")
    assert byte_fallback.decode([b]) == "b"
    assert grown(byte_fallback, [b, a], [a]) == " b a"
    assert (
        text_after(byte_fallback.decode, text_before(byte_fallback.decode, [a]), [b, a]) == " b a"
    )
    assert grown(byte_fallback, [b, a]) == "b a"
    assert byte_fallback.token_bytes(b) == b" b"


def test_skipped_special_tokens_within_a_text(byte_fallback):
    a = byte_fallback._fast.token_to_id("\u2581a")
    assert grown(byte_fallback, [a, 2, a, 2, 2, a], [a]) == " a a a"
    assert grown(byte_fallback, [2] * 100 + [a] * 3, [a]).split() == ["a"] * 3


def test_token_bytes_of_special_and_absent_tokens(byte_level, byte_fallback):
    end = byte_level.eos_token_id
    assert byte_level.token_bytes(end) == b"<|im_end|>"
    assert byte_level.token_bytes(10**6) == b""
    assert byte_fallback.token_bytes(3 + 0xE9) == b"\xe9"


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_tokens_byte_level(byte_level, data):
    ids = st.integers(0, byte_level._fast.get_vocab_size() - 1)
    odd = st.sampled_from([*byte_level.encode("\u4f60\U0001f9ff\u00e9"), *range(20)])
    tokens = data.draw(st.lists(ids | odd, max_size=30))
    prompt = data.draw(st.lists(ids | odd, max_size=8))
    context = text_before(byte_level.decode, prompt)
    assert grown(byte_level, tokens, prompt) == text_after(byte_level.decode, context, tokens)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(3, 258), max_size=60))
def test_any_bytes_neither_fail_nor_stall(byte_fallback, tokens):
    text = Detokenizer(byte_fallback.decode)
    for token in tokens:
        text.push(token)
        assert len(text._held) < MOST_HELD
    text.finish()


def test_a_text_of_far_too_many_tokens_is_hardly_read(byte_level):
    words = "the quick brown fox " * 10_000
    tokens = byte_level.encode(words)
    assert byte_level.encode(words, most=len(tokens)) == tokens
    with pytest.raises(TooLongError, match="of its 200000 characters"):
        byte_level.encode(words, most=100)
    blanks = " " * 200_000  # Dozens of characters a token.
    assert byte_level.encode(blanks, most=10_000) == byte_level.encode(blanks)
