"""RESP, the protocol of Redis and Valkey, from the client's side: versions 2 and 3, no I/O."""

from typing import Final

# Our scripts answer with a few hundred bytes.
MAX_REPLY_BYTES: Final = 64 * 2**20

Reply = object

_END: Final = b"\r\n"


class RespError(Exception):
    """What came is no RESP, or too much of it: the connection is of no more use."""


class ErrorReply:
    """The server's refusal of one command. `code` is its first word, such as NOSCRIPT."""

    __slots__ = ("code", "message")

    def __init__(self, message: str) -> None:
        self.message = message
        self.code = message.partition(" ")[0]


class Push:
    """What the server says unasked (version 3): answers no command."""

    __slots__ = ("items",)

    def __init__(self, items: list[Reply]) -> None:
        self.items = items


class RespParser:
    """Turns bytes, however they are cut, into replies.

    Strings are `bytes`; simple ones, verbatim ones and big numbers too. Nulls of all kinds are None, sets and arrays
    lists, maps dictionaries, attributes are passed over.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Reply]:
        """All replies that are complete now. Raises `RespError`."""
        if self._rest:
            data = self._rest + data
        replies: list[Reply] = []
        position = 0
        size = len(data)
        while position < size:
            # The answer of a script, in one piece: nearly all that there is.
            if data[position] == 36:
                end = data.find(_END, position)
                if end < 0:
                    break
                length = _number(data[position + 1 : end])
                if length >= 0:
                    stop = end + 2 + length
                    if stop + 2 > size:
                        break
                    replies.append(data[end + 2 : stop])
                    position = stop + 2
                    continue
            try:
                reply, position = _parse(data, position)
            except _Incomplete:
                break
            if reply is not _ATTRIBUTES:
                replies.append(reply)
        self._rest = data[position:]
        if len(self._rest) > MAX_REPLY_BYTES:
            raise RespError(f"a reply of more than {MAX_REPLY_BYTES} bytes")
        return replies


def encode_arguments(*arguments: bytes) -> bytes:
    """As they follow the head of a command."""
    return b"".join([b"$%d\r\n%b\r\n" % (len(argument), argument) for argument in arguments])


def encode_command(*arguments: bytes) -> bytes:
    """A command with its arguments."""
    return b"*%d\r\n%b" % (len(arguments), encode_arguments(*arguments))


class _Incomplete(Exception):
    """There is more to come."""


_ATTRIBUTES: Final = object()
_MAX_DEPTH: Final = 32


def _parse(data: bytes, position: int, depth: int = 0) -> tuple[Reply, int]:
    end = data.find(_END, position)
    if end < 0:
        raise _Incomplete
    if depth > _MAX_DEPTH:
        raise RespError("nested too deeply")
    kind, line, following = data[position : position + 1], data[position + 1 : end], end + 2
    match kind:
        case b"+":
            return line, following
        case b"-":
            return ErrorReply(line.decode("utf-8", "replace")), following
        case b":":
            return _number(line), following
        case b"$" | b"!" | b"=":
            return _parse_blob(kind, _number(line), data, following)
        case b"*" | b"~" | b">":
            count = _number(line)
            if count < 0:
                return None, following
            items, following = _parse_many(count, data, following, depth)
            return (Push(items) if kind == b">" else items), following
        case b"%" | b"|":
            items, following = _parse_many(2 * _number(line), data, following, depth)
            if kind == b"|":
                return _ATTRIBUTES, following
            return dict(zip(map(_hashable, items[::2]), items[1::2], strict=True)), following
        case b"_":
            return None, following
        case b"#":
            return line == b"t", following
        case b",":
            try:
                return float(line), following
            except ValueError as exc:
                raise RespError("a number that is none") from exc
        case b"(":
            return line, following
    raise RespError("a reply of unknown kind")


def _parse_blob(kind: bytes, length: int, data: bytes, begin: int) -> tuple[Reply, int]:
    if length < 0:
        return None, begin
    stop = begin + length
    if stop + 2 > len(data):
        raise _Incomplete
    content = data[begin:stop]
    if kind == b"!":
        return ErrorReply(content.decode("utf-8", "replace")), stop + 2
    # Verbatim strings begin with their format, "txt:".
    return (content[4:] if kind == b"=" else content), stop + 2


def _parse_many(count: int, data: bytes, position: int, depth: int) -> tuple[list[Reply], int]:
    items: list[Reply] = []
    while len(items) < count:
        item, position = _parse(data, position, depth + 1)
        if item is not _ATTRIBUTES:
            items.append(item)
    return items, position


def _number(line: bytes) -> int:
    try:
        return int(line)
    except ValueError as exc:
        raise RespError("a number that is none") from exc


def _hashable(key: Reply) -> Reply:
    return tuple(key) if isinstance(key, list) else key
