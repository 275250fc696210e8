"""What commands print: JSON for programs, tables and short figures for people."""

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

# Wide enough that nothing is cut off where no terminal says how wide it is.
_UNBOUNDED = 100_000


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def print_lines(*lines: str, flush: bool = False) -> None:
    """On standard output; `flush` where a question on standard error follows."""
    sys.stdout.write("".join(f"{printable(line)}\n" for line in lines))
    if flush:
        sys.stdout.flush()


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output: fitted to the terminal, or unshortened into a pipe."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    width = None if sys.stdout.isatty() else _UNBOUNDED
    Console(file=sys.stdout, highlight=False, markup=False, width=width).print(table)


def printable(text: str) -> str:
    """`text` without control characters other than line feed and tab: a server's words must not steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or not (c < " " or "\x7f" <= c < "\xa0"))


def format_time(epoch_s: float) -> str:
    """A moment in UTC, to the minute."""
    return datetime.fromtimestamp(epoch_s, UTC).strftime("%Y-%m-%d %H:%M UTC")


def format_size(count: int | None) -> str:
    """Bytes for people; `-` when unknown (None)."""
    from helixflow.pool.disk import format_bytes

    return format_bytes(count) if count is not None else "-"
