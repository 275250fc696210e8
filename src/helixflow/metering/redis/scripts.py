"""The scripts that Redis runs for us, as they are in this package."""

import hashlib
from importlib.resources import files

from helixflow.metering.redis.resp import encode_arguments

_COMMON = "common"


class Script:
    """One script. Its arguments, encoded, follow one of the two heads: by its hash, or in full."""

    __slots__ = ("digest", "evaluate", "evaluate_by_hash", "name", "source")

    def __init__(self, name: str, source: bytes, arguments: int) -> None:
        self.digest = hashlib.sha1(source, usedforsecurity=False).hexdigest().encode()
        self.name = name
        self.source = source
        self.evaluate_by_hash = b"*%d\r\n%b" % (arguments + 2, encode_arguments(b"EVALSHA", self.digest))
        self.evaluate = b"*%d\r\n%b" % (arguments + 2, encode_arguments(b"EVAL", source))


class Scripts:
    """All of them, read from the package. The counts are of what follows the script: the number of keys, keys,
    arguments. Blocks."""

    def __init__(self) -> None:
        folder = files("helixflow.metering.redis")
        common = folder.joinpath(f"{_COMMON}.lua").read_bytes()

        def read(name: str, keys: int, arguments: int) -> Script:
            source = common + b"\n" + folder.joinpath(f"{name}.lua").read_bytes()
            return Script(name, source, 1 + keys + arguments)

        self.admit = read("admit", 1, 3)
        self.settle = read("settle", 1, 2)
        self.hello = read("hello", 1, 5)
        self.join = read("join", 2, 5)
        self.poll = read("poll", 2, 5)
        self.expect = read("expect", 1, 2)
        self.load = read("load", 1, 3)
        self.close = read("close", 1, 3)

    @property
    def all(self) -> tuple[Script, ...]:
        return (self.admit, self.settle, self.hello, self.join, self.poll, self.expect, self.load, self.close)
