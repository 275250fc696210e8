"""Answers that are at hand as a whole."""

from helixflow.core.call import Progress


class WholeAnswer:
    """A `Stream` of one piece."""

    def __init__(self, body: bytes, progress: Progress) -> None:
        self.progress = progress
        self._body = body

    async def read(self) -> bytes:
        body, self._body = self._body, b""
        return body

    def close(self) -> None:
        self._body = b""
