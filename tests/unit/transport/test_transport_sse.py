"""Server-sent events: how the bytes are split never matters."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.transport.sse import EventSplitter, data_of

LINE = st.sampled_from(
    [b"data: x", b"data:", b"data:  two", b": comment", b"event: e", b"id", b'data: {"a":1}', "data: é✓".encode()]
)
END = st.sampled_from([b"\n", b"\r\n", b"\r"])


@st.composite
def event(draw: st.DrawFn) -> bytes:
    end = draw(END)
    return b"".join(line + end for line in draw(st.lists(LINE, min_size=1, max_size=4))) + end


@st.composite
def split(draw: st.DrawFn, data: bytes) -> list[bytes]:
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def feed_all(pieces: list[bytes], **options: int) -> tuple[list[bytes], bytes]:
    splitter = EventSplitter(**options)
    events = [found for piece in pieces for found in splitter.feed(piece)]
    return events, splitter.pending


@given(st.data(), st.lists(event(), max_size=6), st.booleans())
def test_any_split_of_whole_events_gives_the_same_events(data: st.DataObject, events: list[bytes], bom: bool) -> None:
    body = b"\xef\xbb\xbf" * bom + b"".join(events)
    found, pending = feed_all(data.draw(split(body)))
    assert found == events
    assert pending == b""


@given(st.data(), st.binary(max_size=60))
def test_any_split_of_any_bytes_gives_the_same_events(data: st.DataObject, noise: bytes) -> None:
    body = noise.replace(b"a", b"\n").replace(b"b", b"\r")
    assert feed_all(data.draw(split(body))) == feed_all([body])


@given(st.text(alphabet="\r\nx", max_size=12))
def test_byte_by_byte_equals_all_at_once(text: str) -> None:
    body = b"\xef\xbb\xbfdata: x\n\n" + text.encode()
    assert feed_all([bytes([byte]) for byte in body]) == feed_all([body])


@given(st.lists(event(), max_size=4))
def test_the_fast_path_gives_what_the_slow_path_gives(events: list[bytes]) -> None:
    fast, slow = EventSplitter(), EventSplitter()
    for splitter in (fast, slow):
        splitter.feed(b": start\n\n")
    body = b"".join(events)
    assert fast.feed(body) == slow._feed_slowly(body)


def test_several_events_in_one_piece() -> None:
    splitter = EventSplitter()
    assert splitter.feed(b": hi\n\n") == [b": hi\n\n"]
    assert splitter.feed(b"data: 1\n\ndata: 2\n\n") == [b"data: 1\n\n", b"data: 2\n\n"]
    assert splitter.feed(b"data: 1\n\n\n\ndata: 2\n\n") == [b"data: 1\n\n", b"data: 2\n\n"]
    assert splitter.feed(b"\n\n") == []


def test_an_incomplete_event_is_pending() -> None:
    assert feed_all([b"data: 1\n\ndata: 2\n"]) == ([b"data: 1\n\n"], b"data: 2\n")


@pytest.mark.parametrize("pieces", [[b"x" * 101], [b"x" * 60, b"x" * 60], [b"data: " + b"x" * 100 + b"\n\n"]])
def test_an_oversize_event_is_refused(pieces: list[bytes]) -> None:
    with pytest.raises(HelixError) as caught:
        feed_all(pieces, max_event_bytes=100)
    assert caught.value.kind is ErrorKind.UPSTREAM_INVALID


def test_many_small_events_are_no_oversize_event() -> None:
    events, pending = feed_all([b"data: 1\n\n" * 50], max_event_bytes=100)
    assert (len(events), pending) == (50, b"")


@pytest.mark.parametrize(
    ("event", "data"),
    [
        (b"data: {}\n\n", b"{}"),
        (b"data:{}\n\n", b"{}"),
        (b"data:  x\n\n", b" x"),
        (b"data: a\ndata: b\n\n", b"a\nb"),
        (b"data: a\r\ndata: b\r\n\r\n", b"a\nb"),
        (b"event: e\rdata: a\r\r", b"a"),
        (b"data\n\n", b""),
        (b"data:\n\n", b""),
        (b": ping\n\n", None),
        (b"event: e\nid: 1\n\n", None),
        (b"datax: 1\n\n", None),
    ],
)
def test_data_of_an_event(event: bytes, data: bytes | None) -> None:
    assert data_of(event) == data
