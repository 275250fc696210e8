"""Model files as an attacker would make them: real ones, changed. Nothing escapes but a clear refusal."""

import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helixflow.pool.gguf_header import read_gguf_header
from helixflow.pool.manifest import StoredModel

# The head of the file with its 98,000 strings, and the first tensors.
HEAD_BYTES = 1_800_000
NUMBERS = [b"\xff" * 8, b"\0" * 8, (1 << 62).to_bytes(8, "little"), (1 << 31).to_bytes(8, "little"), b"\x09\0\0\0"]


@pytest.fixture(scope="module")
def head(chat_model: StoredModel) -> bytes:
    with chat_model.path.open("rb") as file:
        return file.read(HEAD_BYTES)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(
        st.tuples(
            st.one_of(st.integers(0, 5000), st.integers(0, HEAD_BYTES - 1), st.integers(1_770_000, HEAD_BYTES - 1)),
            st.one_of(st.sampled_from(NUMBERS), st.binary(min_size=1, max_size=8)),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_a_changed_model_is_read_or_refused(
    tmp_path: Path, head: bytes, chat_model: StoredModel, changes: list[tuple[int, bytes]]
) -> None:
    data = bytearray(head)
    for at, what in changes:
        data[at : at + len(what)] = what
    path = tmp_path / "changed.gguf"
    path.write_bytes(data)
    os.truncate(path, chat_model.size_bytes)
    tracemalloc.start()
    try:
        read_gguf_header(path)
    except ValueError as exc:
        assert len(str(exc)) < 80
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 16 << 20


def test_every_cut_of_a_real_model_is_noticed(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(head)
    for length in (HEAD_BYTES, 1_700_000, 100_000, 1000, 24, 23, 5):
        os.truncate(path, length)
        with pytest.raises(ValueError, match="cut short"):
            read_gguf_header(path)
