import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from helixflow.clients import tokenizers
from helixflow.clients.tokenizers import TokenizerCache
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.pool_v1 import pool_pb2

CONTENT = b'{"tokenizer": true}' * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Call:
    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces
        self.cancelled = False

    async def __aiter__(self) -> AsyncIterator[pool_pb2.ReadTokenizerResponse]:
        for piece in self._pieces:
            yield pool_pb2.ReadTokenizerResponse(data=piece)

    def cancel(self) -> None:
        self.cancelled = True


class Stub:
    """A pool that sends `content` whatever it is asked for."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.asked: list[str] = []

    def ReadTokenizer(self, request: pool_pb2.ReadTokenizerRequest, timeout: float) -> Call:
        self.asked.append(request.sha256)
        return Call([self.content[start : start + 4096] for start in range(0, len(self.content), 4096)])


async def test_it_is_fetched_once_and_found_again_by_the_next_process(tmp_path: Path) -> None:
    stub = Stub(CONTENT)
    for _ in range(2):
        cache = TokenizerCache(tmp_path / "cache")
        assert cache.path_of(SHA256) is None
        await cache.fetch(stub, SHA256)
        path = cache.path_of(SHA256)
        assert path is not None and Path(path).read_bytes() == CONTENT
    assert stub.asked == [SHA256]
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [f"{SHA256}.json"]


async def test_a_damaged_copy_is_fetched_again(tmp_path: Path) -> None:
    stub = Stub(CONTENT)
    (tmp_path / f"{SHA256}.json").write_bytes(CONTENT[:-1])
    cache = TokenizerCache(tmp_path)
    await cache.fetch(stub, SHA256)
    assert Path(cache.path_of(SHA256) or "").read_bytes() == CONTENT


@pytest.mark.parametrize("content", [b"", CONTENT + b" ", b"x" * 200_000])
async def test_what_has_another_digest_or_is_too_large_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr(tokenizers, "MAX_BYTES", 100_000)
    cache = TokenizerCache(tmp_path)
    with pytest.raises(HelixError) as caught:
        await cache.fetch(Stub(content), SHA256)
    assert caught.value.kind is ErrorKind.UPSTREAM_INVALID
    assert cache.path_of(SHA256) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "../../../etc/passwd", "AB" * 32, "00" * 31])
async def test_a_digest_that_is_none_names_no_file(tmp_path: Path, name: str) -> None:
    stub = Stub(CONTENT)
    with pytest.raises(HelixError):
        await TokenizerCache(tmp_path).fetch(stub, name)
    assert stub.asked == []


async def test_a_folder_that_takes_nothing_is_told(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(HelixError) as caught:
        await TokenizerCache(tmp_path / "cache").fetch(Stub(CONTENT), SHA256)
    assert caught.value.kind is ErrorKind.STORAGE_FULL
