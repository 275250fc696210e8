"""Finds the line of a key in a TOML text: `tomllib` keeps no positions, and an error without a line is half of one."""

import re

_TABLE = re.compile(r"^\s*(\[\[?)\s*(.+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"""^\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*=""")
_PART = re.compile(r"""[A-Za-z0-9_-]+|"[^"]*"|'[^']*'""")


def line_of(text: str, location: tuple[str | int, ...]) -> int | None:
    """The 1-based line that defines `location` (table indexes as integers), or of its nearest enclosing table or key.

    None when nothing of it stands in the text.
    """
    lines = _positions(text)
    for end in range(len(location), 0, -1):
        if location[:end] in lines:
            return lines[location[:end]]
    return None


def _positions(text: str) -> dict[tuple[str | int, ...], int]:
    found: dict[tuple[str | int, ...], int] = {}
    counts: dict[tuple[str | int, ...], int] = {}
    table: tuple[str | int, ...] = ()
    for number, line in enumerate(text.splitlines(), start=1):
        if match := _TABLE.match(line):
            table = _resolve(_split(match[2]), counts, append=match[1] == "[[")
            found.setdefault(table, number)
        elif match := _KEY.match(line):
            found.setdefault(table + _split(match[1]), number)
    return found


def _split(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip("\"'") for part in _PART.findall(dotted))


def _resolve(
    names: tuple[str, ...], counts: dict[tuple[str | int, ...], int], *, append: bool
) -> tuple[str | int, ...]:
    """The full path of a table header: names of arrays of tables are followed by the index of their latest element."""
    path: tuple[str | int, ...] = ()
    for position, name in enumerate(names):
        path += (name,)
        last = position == len(names) - 1
        if last and append:
            counts[path] = counts.get(path, -1) + 1
        if path in counts:
            path += (counts[path],)
    return path
