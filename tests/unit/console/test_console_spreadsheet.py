"""CSV that spreadsheets show as it is, and calculate nothing from."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixflow.console.spreadsheet import render_rows


def read(data: bytes) -> list[list[str]]:
    return list(csv.reader(io.StringIO(data.decode(), newline="")))


@pytest.mark.parametrize(
    "text",
    ["=1", "+1", "-1", "@SUM(A1)", "\t=1", "  =1", "\r=1", "\n=1", "\tx", "=cmd|' /C calc'!A0", "＝1", "＠x"],
)
def test_a_text_is_never_a_formula(text: str) -> None:
    assert read(render_rows([[text, 3]])) == [[f"'{text}", "3"]]


def test_other_texts_and_numbers_stay_as_they_are() -> None:
    row = ["a=b", "Größe, klein", 'say "yes"', "two\nlines", "", "1.50", -3]
    assert read(render_rows([row])) == [list(map(str, row))]
    assert render_rows([["a", 1], ["b", 2]]) == b"a,1\r\nb,2\r\n"


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20), min_size=1))
def test_every_cell_can_be_read_back(row: list[str]) -> None:
    (back,) = read(render_rows([[*row, 1]]))
    assert [cell.removeprefix("'") for cell in back[:-1]] == [cell.removeprefix("'") for cell in row]
