"""Streams of text: however they are cut, the pieces joined are the whole."""

import tempfile
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.text import StopMatcher, Tokenizer, byte_tokenizer, load_tokenizer
from tests.checkpoints import FAMILIES, write_folder


@cache
def _tokenizer(family: str) -> Tokenizer:
    if family == "bytes":
        return byte_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        return load_tokenizer(write_folder(Path(folder), FAMILIES[family]()))


TEXTS = st.text(st.characters(codec="utf-8"), max_size=40)
CUTS = st.lists(st.integers(1, 5), min_size=1, max_size=20)


def _pieces(tokens: list[int], cuts: list[int]) -> list[list[int]]:
    pieces: list[list[int]] = []
    while tokens:
        size = cuts[len(pieces) % len(cuts)]
        pieces.append(tokens[:size])
        tokens = tokens[size:]
    return pieces


@pytest.mark.parametrize("family", ["bytes", *FAMILIES])
@given(text=TEXTS, cuts=CUTS)
def test_increments_of_a_text_join_to_its_decoding(family: str, text: str, cuts: list[int]) -> None:
    """A streamed answer must read like the same answer not streamed."""
    tokenizer = _tokenizer(family)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = tokenizer.detokenizer()
    shown = [detokenizer.feed(piece) for piece in _pieces(tokens, cuts)]
    assert "".join(shown) + detokenizer.flush() == tokenizer.decode(tokens)


@pytest.mark.parametrize("family", ["bytes", "byte_level", "metaspace"])
@given(data=st.data(), cuts=CUTS)
def test_increments_of_any_tokens_join_to_their_decoding(
    family: str, data: st.DataObject, cuts: list[int]
) -> None:
    """Models make broken UTF-8, and specials in odd places: neither may lose or repeat text."""
    tokenizer = _tokenizer(family)
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=30))
    detokenizer = tokenizer.detokenizer()
    shown = [detokenizer.feed(piece) for piece in _pieces(tokens, cuts)]
    assert "".join(shown) + detokenizer.flush() == tokenizer.decode(tokens)


@given(data=st.data(), cuts=CUTS)
def test_increments_do_not_depend_on_the_cuts(data: st.DataObject, cuts: list[int]) -> None:
    """Two replicas may send chunks of other sizes; the text must be the same. (Sentencepiece
    with broken UTF-8: its own decoder changes its mind about bytes already shown.)"""
    tokenizer = _tokenizer("sentencepiece")
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    one, many = tokenizer.detokenizer(), tokenizer.detokenizer()
    shown = "".join([many.feed(piece) for piece in _pieces(tokens, cuts)]) + many.flush()
    assert shown == one.feed(tokens) + one.flush()


@pytest.mark.parametrize("family", ["bytes", *FAMILIES])
@given(text=TEXTS)
def test_no_replacement_character_is_shown_for_half_a_character(family: str, text: str) -> None:
    """Token by token, an emoji must appear whole or not yet, never as a question mark."""
    tokenizer = _tokenizer(family)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(tokens)
    detokenizer = tokenizer.detokenizer()
    shown = ""
    for token in tokens:
        shown += detokenizer.feed([token])
        assert whole.startswith(shown)


STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=4)


@given(text=st.text("abc\n", max_size=30), stop=STOPS, cuts=CUTS)
def test_stops_are_found_however_the_text_is_cut(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    """The answer must end at the same place whether tokens come alone or in bunches, and what is
    held back must be no more than could still become a stop string."""
    ends = [
        (end, end - len(s)) for end in range(len(text) + 1) for s in stop if text[:end].endswith(s)
    ]
    expected = text[: min(ends)[1]] if ends else text
    matcher, shown, stopped = StopMatcher(tuple(stop)), "", False
    for piece in _pieces([ord(char) for char in text], cuts):
        emit, stopped = matcher.feed("".join(map(chr, piece)))
        shown += emit
        assert expected.startswith(shown)
        if stopped:
            break
    assert stopped == bool(ends)
    assert shown + matcher.flush() == expected


@given(text=st.text("ab", max_size=12), stop=STOPS)
def test_nothing_is_held_back_that_could_be_shown(text: str, stop: list[str]) -> None:
    """Text held back for no reason is latency that the client sees."""
    matcher = StopMatcher(tuple(stop))
    emit, stopped = matcher.feed(text)
    if not stopped:
        held = text[len(emit) :]
        assert not held or any(s.startswith(held) and s != held for s in stop)
