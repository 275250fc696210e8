"""Tables as CSV (RFC 4180) that people open in spreadsheets: no cell is taken for a formula."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Final

MEDIA_TYPE: Final = "text/csv"
# What makes a cell a formula there, also in its full-width form; white space before it is passed over.
_FORMULA: Final = tuple("=+-@＝＋－＠")


def render_rows(rows: Iterable[Sequence[str | int]]) -> bytes:
    """The rows in UTF-8. Texts that could be formulas get an apostrophe before them, as spreadsheets write them."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    for row in rows:
        writer.writerow([_cell(value) for value in row])
    return out.getvalue().encode()


def _cell(value: str | int) -> str | int:
    if isinstance(value, str) and value.lstrip().startswith(_FORMULA):
        return f"'{value}"
    # They end a row, or begin a formula on the next one, for readers that know no quotes.
    if isinstance(value, str) and value.startswith(("\t", "\r", "\n")):
        return f"'{value}"
    return value
