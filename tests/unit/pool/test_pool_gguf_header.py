"""What the head of a model file tells, and which files are refused."""

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helixflow.pool.gguf_header import GgufHeader, read_gguf_header

UINT32, STRING, ARRAY, FLOAT32 = 4, 8, 9, 6


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


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, dimensions: tuple[int, ...], kind: int, offset: int) -> bytes:
    shape = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


def compose(entries: list[bytes], tensors: list[bytes], data: int = 0) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries)) + b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes], GgufHeader]:
    def read_bytes(data: bytes) -> GgufHeader:
        path = tmp_path / "m.gguf"
        path.write_bytes(data)
        return read_gguf_header(path)

    return read_bytes


def test_what_memory_is_planned_from(read: Callable[[bytes], GgufHeader]) -> None:
    header = read(
        compose(
            [
                entry("general.architecture", STRING, text("x")),
                entry("x.block_count", UINT32, struct.pack("<I", 3)),
                entry("x.attention.head_count", UINT32, struct.pack("<I", 8)),
                entry("x.attention.head_count_kv", ARRAY, struct.pack("<IQ3I", UINT32, 3, 4, 0, 4)),
                entry("x.rope", ARRAY, struct.pack("<IQ3f", FLOAT32, 3, float("inf"), 1, 2)),
                entry("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, 2) + text("a") + text("b")),
                entry("tokenizer.chat_template", STRING, text("{" * 100_000)),
            ],
            [tensor("a", (32, 4), 2, 0)],
            data=72,
        )
    )
    assert (header.vocabulary, header.tensor_bytes, header.figure("block_count")) == (2, 72, 3)
    assert header.figures("attention.head_count", 3) == (8, 8, 8)
    assert header.figures("attention.head_count_kv", 3) == (4, 0, 4)
    assert header.figures("rope", 3) == header.figures("nothing", 3) == ()
    assert "tokenizer.chat_template" not in header.metadata


def test_the_sizes_of_types_are_those_of_ggml(read: Callable[[bytes], GgufHeader]) -> None:
    """Byte by byte: the data of one row of each type fits exactly, and one byte less is noticed."""
    for kind, (values, size) in GGML_QUANT_SIZES.items():
        if kind in (GGMLQuantizationType.Q8_1, *(one for one in GGMLQuantizationType if one > 39)):
            continue  # never in files, or newer than this reader
        whole = compose([], [tensor("a", (values, 3), kind, 0)], data=3 * size)
        assert read(whole).tensor_bytes == 3 * size
        with pytest.raises(ValueError, match="cut short"):
            read(whole[:-1])


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 0) + bytes(64), id="tensors without end"),
        pytest.param(b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 40) + bytes(64), id="entries without end"),
        pytest.param(compose([entry("a", ARRAY, struct.pack("<IQ", ARRAY, 1) + bytes(64))], []), id="arrays in arrays"),
        pytest.param(compose([entry("a", ARRAY, struct.pack("<IQ", STRING, 1 << 50))], []), id="strings without end"),
        pytest.param(compose([entry("a", 99, bytes(64))], []), id="a kind that is none"),
        pytest.param(compose([entry("a", UINT32, bytes(4))] * 2, []), id="the same key twice"),
        pytest.param(compose([], [tensor("a", (4,), 0, 0), tensor("b", (4,), 0, 0)], 64), id="overlapping tensors"),
        pytest.param(compose([], [tensor("a", (4,), 0, 5)], 64), id="a tensor between the seats"),
        pytest.param(compose([], [tensor("a", (33,), 2, 0)], 64), id="half a block"),
        pytest.param(compose([], [tensor("a", (1, 1, 1, 1, 1), 0, 0)], 64), id="five dimensions"),
        pytest.param(compose([entry("general.alignment", UINT32, struct.pack("<I", 3))], []), id="an odd alignment"),
        pytest.param(compose([entry("k" * 70_000, UINT32, bytes(4))], []), id="a name that is a book"),
    ],
)
def test_damaged_headers(read: Callable[[bytes], GgufHeader], data: bytes) -> None:
    with pytest.raises(ValueError, match="damaged"):
        read(data)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(compose([entry("a", ARRAY, struct.pack("<IQ", FLOAT32, 1 << 60))], []), id="numbers without end"),
        pytest.param(compose([entry("a", STRING, struct.pack("<Q", 1 << 62))], []), id="a text without end"),
        pytest.param(compose([], [tensor("a", (1 << 62, 1 << 62, 1 << 62), 0, 0)], 64), id="a tensor without end"),
        pytest.param(compose([], [tensor("a", (4,), 0, 1 << 63)], 64), id="an offset without end"),
    ],
)
def test_lengths_beyond_the_file(read: Callable[[bytes], GgufHeader], data: bytes) -> None:
    with pytest.raises(ValueError, match="cut short"):
        read(data)


def test_only_files_are_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a file"):
        read_gguf_header(tmp_path)


@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=9)), max_size=4),
    keep=st.floats(0, 1),
)
def test_no_damage_escapes_or_allocates(
    tmp_path: Path, gguf_bytes: bytes, changes: list[tuple[float, bytes]], keep: float
) -> None:
    data = bytearray(gguf_bytes)
    for where, what in changes:
        at = int(where * len(data))
        data[at : at + len(what)] = what
    path = tmp_path / "m.gguf"
    path.write_bytes(data[: int(keep * len(data)) + 1])
    tracemalloc.start()
    try:
        read_gguf_header(path)
    except ValueError as exc:
        assert len(str(exc)) < 80
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20
