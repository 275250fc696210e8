"""What the head of a model file tells, and which files are refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

from helixflow.pool.gguf_header import read_gguf_header


def test_metadata(tmp_path: Path, make_gguf: Callable[..., bytes]) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(make_gguf(context=4096))
    header = read_gguf_header(path)
    assert (header.architecture, header.licence, header.context) == ("llama", "mit", 4096)


def test_every_truncation_is_noticed(tmp_path: Path, make_gguf: Callable[..., bytes]) -> None:
    whole = make_gguf(filler=b"")
    path = tmp_path / "m.gguf"
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut short|not a GGUF"):
            read_gguf_header(path)


def test_a_tensor_beyond_the_end(tmp_path: Path, make_gguf: Callable[..., bytes]) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(make_gguf(tensor_offset=1 << 30))
    with pytest.raises(ValueError, match="cut short"):
        read_gguf_header(path)


@pytest.mark.parametrize("data", [b"", b"GG", b"not a model at all", b"GGUF\x63\0\0\0" + b"\0" * 16])
def test_other_files(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"it is not|version"):
        read_gguf_header(path)


def test_absurd_lengths_are_refused_without_reading_them(tmp_path: Path, gguf_bytes: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes[:24] + b"\xff" * 8 + gguf_bytes[32:])
    with pytest.raises(ValueError, match="damaged"):
        read_gguf_header(path)
