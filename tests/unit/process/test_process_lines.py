from hypothesis import given
from hypothesis import strategies as st

from helixflow.process.lines import MAX_LINE_BYTES, LineSplitter, level_of


@given(st.text(alphabet="ab\n", max_size=200), st.integers(1, 7))
def test_lines_do_not_depend_on_how_the_bytes_are_cut(text: str, size: int) -> None:
    data = text.encode()
    splitter = LineSplitter()
    lines = [line for i in range(0, len(data), size) for line in splitter.feed(data[i : i + size])]
    lines += splitter.finish()
    assert lines == [line for line in text.split("\n") if line]


def test_a_long_line_is_cut_and_the_next_one_is_whole() -> None:
    splitter = LineSplitter()
    lines = splitter.feed(b"x" * 10) + splitter.feed(b"y" * 100_000) + splitter.feed(b"z\nnext\n")
    assert len(lines) == 2
    assert lines[0].endswith("…")
    assert len(lines[0].encode()) <= MAX_LINE_BYTES + 3
    assert lines[1] == "next"


def test_bytes_that_are_no_text_do_not_raise() -> None:
    assert LineSplitter().feed(b"\xff\xfe ok\n") == ["\ufffd\ufffd ok"]


def test_levels_are_those_that_llama_cpp_marks() -> None:
    assert level_of("0.00.034.210 E llama_model_load: error loading model") == "error"
    assert level_of("0.00.034.210 W something odd") == "warning"
    assert level_of("0.00.034.210 I fine") == "debug"
    assert level_of("a line that mentions E late, after the place of the mark E ") == "debug"
