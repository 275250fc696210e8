"""RESP without I/O: every reply, however it is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixflow.core.errors import UserError
from helixflow.metering.redis.link import Address, parse_url
from helixflow.metering.redis.resp import ErrorReply, Push, RespError, RespParser, encode_command

REPLIES = [
    (b"+OK\r\n", b"OK"),
    (b":-7\r\n", -7),
    (b"$5\r\na\r\nbc\r\n", b"a\r\nbc"),
    (b"$0\r\n\r\n", b""),
    (b"$-1\r\n", None),
    (b"*-1\r\n", None),
    (b"_\r\n", None),
    (b"*2\r\n:1\r\n*1\r\n$1\r\nx\r\n", [1, [b"x"]]),
    (b"*0\r\n", []),
    (b"~1\r\n+a\r\n", [b"a"]),
    (b"%2\r\n+a\r\n:1\r\n*1\r\n:2\r\n_\r\n", {b"a": 1, (2,): None}),
    (b"#t\r\n", True),
    (b",1.5\r\n", 1.5),
    (b"(123456789012345678901234567890\r\n", b"123456789012345678901234567890"),
    (b"=7\r\ntxt:abc\r\n", b"abc"),
    (b"*1\r\n|1\r\n+ttl\r\n:3\r\n$1\r\ny\r\n", [b"y"]),
]


@given(st.lists(st.sampled_from(REPLIES), max_size=8), st.lists(st.integers(1, 12), max_size=60))
def test_replies_come_out_whole_however_they_are_cut(replies: list[tuple[bytes, object]], cuts: list[int]) -> None:
    data = b"".join(wire for wire, _ in replies)
    parser = RespParser()
    found: list[object] = []
    for size in cuts:
        piece, data = data[:size], data[size:]
        found += parser.feed(piece)
    found += parser.feed(data)
    assert found == [value for _, value in replies]


@pytest.mark.parametrize("wire", [b"-NOSCRIPT No matching script.\r\n", b"!28\r\nNOSCRIPT No matching script.\r\n"])
def test_refusals_have_a_code(wire: bytes) -> None:
    [reply] = RespParser().feed(wire)
    assert isinstance(reply, ErrorReply)
    assert (reply.code, reply.message.strip()) == ("NOSCRIPT", "NOSCRIPT No matching script.")


def test_what_the_server_says_unasked_is_told_apart() -> None:
    push, reply = RespParser().feed(b">2\r\n+invalidate\r\n_\r\n+OK\r\n")
    assert isinstance(push, Push)
    assert (push.items, reply) == ([b"invalidate", None], b"OK")


@pytest.mark.parametrize(
    "wire", [b"HTTP/1.1 400 Bad Request\r\n", b"$x\r\n", b":\r\n", b",one\r\n", b"*1\r\n" * 40 + b":1\r\n"]
)
def test_anything_else_is_refused(wire: bytes) -> None:
    with pytest.raises(RespError):
        RespParser().feed(wire)


def test_commands_carry_any_bytes() -> None:
    assert encode_command(b"SET", b"a\r\n", b"") == b"*3\r\n$3\r\nSET\r\n$3\r\na\r\n\r\n$0\r\n\r\n"


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://cache", Address("cache", 6379)),
        ("redis://127.0.0.1:7000/3", Address("127.0.0.1", 7000, "", 3)),
        ("rediss://[::1]:7000", Address("::1", 7000, "", 0, True)),
        ("unix:///run/my%20redis.sock", Address(path="/run/my redis.sock")),
    ],
)
def test_addresses(url: str, address: Address) -> None:
    assert parse_url(url) == address


@pytest.mark.parametrize("url", ["redis://", "redis://cache:port", "redis://cache/x", "unix://", "redis://cache:99999"])
def test_other_addresses_are_refused_with_what_is_expected(url: str) -> None:
    with pytest.raises(UserError, match="redis://host:port/database"):
        parse_url(url)
