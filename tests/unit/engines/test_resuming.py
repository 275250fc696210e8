"""Seams of answers that go on elsewhere: the client's text is the engine's text, whatever is held back, and wherever it
breaks off.
"""

from collections.abc import Iterator, Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixflow.engines.resuming import CatchUp, Token, TokenLog

# Halves of characters, words that are parts of other words, and line ends, as in any byte-level vocabulary.
VOCABULARY = [
    *(
        b"a",
        b"b",
        b"ab",
        b"abc",
        b"c",
        b" ",
        b" a",
        b" ab",
        b"\n",
        b"\n\n",
        b'"',
        b"\\",
        b"E",
        b"EN",
        b"END",
        b"N",
        b"D",
    ),
    *(b"\xf0\x9f", b"\x8c", b"\x8c\x8c", b"\xf0\x9f\x8c\x8c", b"\xe4\xbd", b"\xa0", b"\xe4\xbd\xa0", b" \xf0\x9f"),
]
STOP = "END"


def tokenise(text: str) -> list[Token]:
    """The vocabulary's own choice: the longest word first."""
    data, tokens = text.encode(), []
    while data:
        word = max((w for w in VOCABULARY if data.startswith(w)), key=len)
        tokens.append(Token(VOCABULARY.index(word), len(word)))
        data = data[len(word) :]
    return tokens


def text_of(ids: Sequence[int]) -> bytes:
    return b"".join(VOCABULARY[token] for token in ids)


def escaped(text: str) -> bytes:
    return msgspec.json.encode(text)[1:-1]


def is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def stream(ids: Sequence[int]) -> Iterator[tuple[str, int, int]]:
    """What an engine says of its tokens: text is held back while a character, or perhaps the stop, is incomplete."""
    held = b""
    for made, token in enumerate(ids, 1):
        held += VOCABULARY[token]
        if is_text(held) and not any(held.decode().endswith(STOP[:size]) for size in range(1, len(STOP) + 1)):
            yield held.decode(), token, made
            held = b""


def whole_characters(ids: Sequence[int]) -> bool:
    return is_text(text_of(ids))


words = st.lists(st.integers(0, len(VOCABULARY) - 1), min_size=1, max_size=30).filter(whole_characters)
deaths = st.lists(st.integers(0, 12), max_size=4)


@given(words, deaths)
def test_nothing_is_repeated_or_missing_however_often_it_breaks_off(ids: list[int], deaths: list[int]) -> None:
    undisturbed = "".join(text for text, _, _ in stream(ids))
    log, catch_up, received = TokenLog(), CatchUp(), ""
    rest: Sequence[int] = ids
    for events in [*deaths, 10_000]:
        for position, (text, token, made) in enumerate(stream(rest)):
            if position == events:
                break
            log.note(escaped(text), token, made)
            new = catch_up.pass_on(text)
            assert new is not None
            received += new
        else:
            break
        whole = tokenise(log.text)
        apart = {at: tokenise(gap) for at, gap in log.gaps(whole).items()}
        catch_up = CatchUp(log.settle(whole, apart) + catch_up.left)
        known = text_of(log.ids)
        assert known + catch_up.left.encode() == received.encode()
        assert undisturbed.startswith(received)
        # The next replica goes on from what it is given: with the same tokens for the rest.
        count = next(n for n in range(len(ids) + 1) if text_of(ids[:n]) == known)
        rest = ids[count:]
    assert received == undisturbed


@given(words)
def test_tokens_that_come_one_by_one_are_taken_as_they_are(ids: list[int]) -> None:
    log = TokenLog()
    made = 0
    for token in ids:
        if is_text(VOCABULARY[token]):
            made += 1
            log.note(escaped(VOCABULARY[token].decode()), token, made)
    assert log.gaps(()) == {}
    assert log.settle((), {}) == ""
    assert log.ids == [token for token in ids if is_text(VOCABULARY[token])]
    assert log.exact


def test_a_gap_is_closed_where_count_and_last_id_fit() -> None:
    log = TokenLog()
    emoji = [VOCABULARY.index(part) for part in (b"\xf0\x9f", b"\x8c\x8c")]
    log.note(b"a", 0, 1)
    log.note("🌌".encode(), emoji[1], 3)
    log.note(b"b", 1, 4)
    whole = [Token(0, 1), Token(emoji[0], 2), Token(emoji[1], 2), Token(1, 1)]
    assert log.gaps(whole) == {}
    assert log.settle(whole, {}) == ""
    assert log.ids == [0, *emoji, 1]


@pytest.mark.parametrize("newest", [True, False])
def test_a_gap_that_cannot_be_closed_is_made_again_only_at_the_end(newest: bool) -> None:
    log = TokenLog()
    parts = [VOCABULARY.index(part) for part in (b"\xf0\x9f", b"\x8c")]
    log.note(b"a", 0, 1)
    log.note("🌌".encode(), parts[1], 4)
    if not newest:
        log.note(b"b", 1, 5)
    whole = tokenise(log.text)
    assert log.gaps(whole) == {1: "🌌"}
    again = log.settle(whole, {1: tokenise("🌌")})
    if newest:
        assert (again, log.ids, log.exact) == ("🌌", [0], True)
    else:
        assert (again, text_of(log.ids).decode(), log.exact) == ("", "a🌌b", False)


def test_a_tokeniser_that_puts_a_space_before_every_text_is_understood() -> None:
    log = TokenLog()
    log.note(b"a", 0, 1)
    log.note(b"bc", 4, 3)
    whole = [Token(6, 2), Token(1, 1), Token(4, 1)]  # " a", "b", "c"
    assert log.settle(whole, {}) == ""
    assert log.ids == [0, 1, 4]


def test_text_made_again_must_be_the_same() -> None:
    catch_up = CatchUp("one two")
    assert catch_up.pass_on("one ") == ""
    assert catch_up.pass_on("three") is None
    assert CatchUp("one").pass_on("one two") == " two"
    assert CatchUp("one").pass_on("on") == ""
