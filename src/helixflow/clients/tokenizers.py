"""Tokenizers of models on other nodes: fetched once from a pool, checked, and kept on this node's disk."""

import asyncio
import contextlib
import hashlib
import os
import re
import secrets
from pathlib import Path
from typing import Any, Final

import grpc

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.errors import from_rpc_error
from helixflow.rpc.generated.pool_v1 import pool_pb2

FETCH_TIMEOUT_S: Final = 60.0
# The largest known ones have 35 MB.
MAX_BYTES: Final = 128 * 2**20
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


class TokenizerCache:
    """Files by their SHA-256 under `folder`, which several processes may share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, str] = {}

    def path_of(self, sha256: str) -> str | None:
        """Where the file is, once `fetch` has made sure of it."""
        return self._known.get(sha256)

    async def fetch(self, stub: Any, sha256: str) -> None:
        """Makes sure that the file is here, from the pool behind `stub` if need be.

        Raises `HelixError`: what the pool says, UPSTREAM_INVALID for what has another digest or is too large, and
        STORAGE_FULL when it cannot be kept.
        """
        if _SHA256.fullmatch(sha256) is None:
            raise HelixError(ErrorKind.UPSTREAM_INVALID, "The pool named a tokenizer by what is no SHA-256.")
        path = self._folder / f"{sha256}.json"
        if not await asyncio.to_thread(_is_whole, path, sha256):
            content = await _read(stub, sha256)
            if hashlib.sha256(content).hexdigest() != sha256:
                raise HelixError(ErrorKind.UPSTREAM_INVALID, "The pool sent a tokenizer of another SHA-256.")
            try:
                await asyncio.to_thread(_write, path, content)
            except OSError as exc:
                raise HelixError(ErrorKind.STORAGE_FULL, f"A tokenizer cannot be kept: {exc.strerror}.") from exc
        self._known[sha256] = str(path)


async def _read(stub: Any, sha256: str) -> bytes:
    content = bytearray()
    call = stub.ReadTokenizer(pool_pb2.ReadTokenizerRequest(sha256=sha256), timeout=FETCH_TIMEOUT_S)
    try:
        async for message in call:
            content += message.data
            if len(content) > MAX_BYTES:
                raise HelixError(ErrorKind.UPSTREAM_INVALID, "The pool sent a tokenizer that is too large.")
    except grpc.RpcError as exc:
        raise from_rpc_error(exc) from exc
    finally:
        call.cancel()
    return bytes(content)


def _is_whole(path: Path, sha256: str) -> bool:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except OSError:
        return False


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".new-{secrets.token_hex(8)}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(content)
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
