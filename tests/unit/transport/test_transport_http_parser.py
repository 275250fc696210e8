"""The response parser against scripted bytes, in every split."""

from dataclasses import dataclass

import pytest

from helixflow.transport.http_parser import ResponseError, ResponseParser

CRLF2 = b"\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked" + CRLF2


@dataclass
class Outcome:
    status: int
    headers: dict[bytes, bytes]
    body: bytes
    complete: bool
    reusable: bool


def parse(pieces: list[bytes], *, bodiless: bool = False, finish: bool = False, max_head_bytes: int = 65536) -> Outcome:
    parser = ResponseParser(max_head_bytes)
    parser.start(bodiless=bodiless)
    for piece in pieces:
        parser.feed(piece)
    if finish:
        parser.finish()
    return Outcome(parser.status, parser.headers, b"".join(parser.pieces), parser.complete, parser.reusable)


def every_split(data: bytes) -> list[list[bytes]]:
    return [[data], *([data[:i], data[i:]] for i in range(1, len(data))), [bytes([b]) for b in data]]


@pytest.mark.parametrize(
    ("data", "status", "body", "reusable"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5" + CRLF2 + b"hello", 200, b"hello", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0" + CRLF2, 200, b"", True),
        (b"HTTP/1.1 204 No Content" + CRLF2, 204, b"", True),
        (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 9" + CRLF2, 304, b"", True),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\ncontent-length: 2" + CRLF2 + b"ok", 200, b"ok", False),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 2" + CRLF2 + b"ok", 200, b"ok", False),
        (CHUNKED + b"3\r\nabc\r\n2;x=y\r\nde\r\n0" + CRLF2, 200, b"abcde", True),
        (CHUNKED + b"1\r\na\r\n0\r\ntrailer: x" + CRLF2, 200, b"a", True),
        (b"HTTP/1.1 100 Continue" + CRLF2 + b"HTTP/1.1 103 Hints\r\nx: y" + CRLF2
         + b"HTTP/1.1 429 Slow\r\ncontent-length: 1" + CRLF2 + b"!", 429, b"!", True),
    ],
)  # fmt: skip
def test_whole_responses_in_every_split(data: bytes, status: int, body: bytes, reusable: bool) -> None:
    for pieces in every_split(data):
        outcome = parse(pieces, finish=True)
        assert (outcome.status, outcome.body, outcome.complete, outcome.reusable) == (status, body, True, reusable)
        assert b"x" not in outcome.headers
        assert b"trailer" not in outcome.headers


def test_header_names_are_lower_case_values_stripped_and_the_last_wins() -> None:
    outcome = parse([b"HTTP/1.1 200 OK\r\nX-A: 1\r\nx-a:  2 \t\r\ncontent-length: 0" + CRLF2])
    assert outcome.headers == {b"x-a": b"2", b"content-length": b"0"}


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK", b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip"])
def test_a_body_without_length_ends_with_the_connection(head: bytes) -> None:
    for pieces in every_split(head + CRLF2 + b"abc"):
        assert not parse(pieces).complete
        outcome = parse(pieces, finish=True)
        assert (outcome.body, outcome.complete, outcome.reusable) == (b"abc", True, False)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"HTTP/1.1 200 OK\r\ncontent-le",
        b"HTTP/1.1 100 Continue" + CRLF2,
        b"HTTP/1.1 200 OK\r\ncontent-length: 5" + CRLF2 + b"hell",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked" + CRLF2 + b"5\r\nhel",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked" + CRLF2 + b"3\r\nabc\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked" + CRLF2 + b"3\r\nabc\r\n0\r\n",
    ],
)
def test_premature_ends(data: bytes) -> None:
    for pieces in every_split(data) if data else [[]]:
        with pytest.raises(ResponseError):
            parse(pieces, finish=True)


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 abc" + CRLF2,
        b"HTTP/1.1 200 OK\nx: y\n\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: -1" + CRLF2,
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2" + CRLF2,
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked" + CRLF2,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 1" + CRLF2,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked" + CRLF2 + b"xyz\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked" + CRLF2 + b"fffffffffffffffff\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked" + CRLF2 + b"1\r\nabc\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x" + CRLF2,
    ],
)
def test_garbage_is_refused_in_every_split(data: bytes) -> None:
    for pieces in every_split(data):
        with pytest.raises(ResponseError):
            parse(pieces, finish=True)


@pytest.mark.parametrize(
    "rest", [b"x", b"HTTP/1.1 200 OK\r\ncontent-length: 0" + CRLF2, b"HTTP/1.1 200 OK\r\nevil: 1\r\n"]
)
def test_bytes_beyond_the_end_spoil_the_connection_not_the_response(rest: bytes) -> None:
    outcome = parse([b"HTTP/1.1 200 OK\r\ncontent-length: 2" + CRLF2 + b"ok" + rest])
    assert (outcome.body, outcome.complete, outcome.reusable) == (b"ok", True, False)
    assert outcome.headers == {b"content-length": b"2"}


@pytest.mark.parametrize(
    "head",
    [b"HTTP/1.1 200 OK\r\nx: " + b"y" * 2000, b"HTTP/1.1 200 OK\r\n" + b"".join(b"x%d: y\r\n" % i for i in range(300))],
)
def test_an_oversize_head_is_refused(head: bytes) -> None:
    for pieces in ([head + CRLF2], [head], [head[:900], head[900:], CRLF2], [bytes([b]) for b in head]):
        with pytest.raises(ResponseError, match="too large"):
            parse(pieces, max_head_bytes=1000)


def test_endless_interim_responses_are_refused() -> None:
    with pytest.raises(ResponseError, match="too large"):
        parse([b"HTTP/1.1 100 Continue" + CRLF2] * 100, max_head_bytes=1000)


def test_a_large_body_does_not_count_as_head() -> None:
    data = b"HTTP/1.1 200 OK\r\ncontent-length: 5000" + CRLF2 + b"x" * 5000
    assert parse([data], max_head_bytes=1000).complete
    assert parse([data[:60], data[60:]], max_head_bytes=1000).complete


def test_the_answer_to_head_has_no_body() -> None:
    for pieces in every_split(b"HTTP/1.1 200 OK\r\ncontent-length: 5" + CRLF2):
        outcome = parse(pieces, bodiless=True)
        assert (outcome.status, outcome.body, outcome.complete, outcome.reusable) == (200, b"", True, False)


def test_one_parser_reads_one_response_after_the_other() -> None:
    parser = ResponseParser()
    for number in range(3):
        parser.start()
        parser.feed(b"HTTP/1.1 200 OK\r\nn: %d\r\ncontent-length: 1" % number + CRLF2 + b"%d" % number)
        assert (parser.headers[b"n"], parser.pieces, parser.reusable) == (b"%d" % number, [b"%d" % number], True)
