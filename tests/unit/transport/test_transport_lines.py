"""Lines of JSON, however their bytes arrive."""

import pytest

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.transport.lines import LineSplitter


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_lines_are_the_same_however_they_are_split(size: int) -> None:
    data = b'{"a":1}\r\n\n{"b":2}\n  \n{"c"'
    splitter = LineSplitter()
    lines = [line for start in range(0, len(data), size) for line in splitter.feed(data[start : start + size])]
    assert lines == [b'{"a":1}', b'{"b":2}']
    assert splitter.pending == b'{"c"'


@pytest.mark.parametrize("data", [b"x" * 11, b"ab\n" + b"x" * 11, b"x" * 11 + b"\n"])
def test_a_line_has_a_bound(data: bytes) -> None:
    with pytest.raises(HelixError) as error:
        LineSplitter(10).feed(data)
    assert error.value.kind is ErrorKind.UPSTREAM_INVALID
