"""Answers that are at hand as a whole."""


class WholeAnswer:
    """A `Stream` of one piece. Who needs no stream takes `body` instead of reading; nothing is left to close then."""

    __slots__ = ("body",)

    def __init__(self, body: bytes) -> None:
        self.body = body

    async def read(self) -> bytes:
        body, self.body = self.body, b""
        return body

    def close(self) -> None:
        self.body = b""
