"""The tokenizers of this node's models, for gateways on other nodes: known by their SHA-256."""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from pathlib import Path
from typing import BinaryIO, Final

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.pool.lifecycle import DeploymentView

CHUNK_BYTES: Final = 256 * 1024


async def read_tokenizer(views: Iterable[DeploymentView], sha256: str) -> AsyncGenerator[bytes, None]:
    """The pieces of the tokenizer with that digest, of a replica that serves now.

    Raises `HelixError`: NOT_FOUND when no replica has it, INTERNAL when the file is gone.
    """
    serving = (serving for view in views for serving in view.replicas)
    path = next((one.replica.tokenizer_path for one in serving if sha256 and one.tokenizer_sha256 == sha256), "")
    if not path:
        raise HelixError(ErrorKind.NOT_FOUND, "No replica of this node has that tokenizer.", param="sha256")
    try:
        file = await asyncio.to_thread(Path(path).open, "rb")
    except OSError as exc:
        raise HelixError(ErrorKind.INTERNAL, "The tokenizer cannot be read.") from exc
    try:
        while piece := await asyncio.to_thread(_read, file):
            yield piece
    finally:
        file.close()


def _read(file: BinaryIO) -> bytes:
    return file.read(CHUNK_BYTES)
