"""The page on the audit log says enough to verify an export without this code: its own snippet does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.audit import build_export, build_records, new_key

PAGE = Path(__file__).resolve().parents[3] / "docs" / "reference" / "audit-log.md"
LINES = build_export(build_records(5), new_key(), checkpoints=(2, 5))


def verify_by_page(folder: Path, lines: list[bytes]) -> "subprocess.CompletedProcess[str]":
    (snippet,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert "helixflow" not in snippet
    program, export = folder / "snippet.py", folder / "audit.jsonl"
    program.write_text(snippet, encoding="utf-8")
    export.write_bytes(b"".join(lines))
    return subprocess.run(
        [sys.executable, "-I", program, export], capture_output=True, text=True, timeout=60, check=False
    )


def test_the_snippet_verifies_an_export(tmp_path: Path) -> None:
    done = verify_by_page(tmp_path, LINES)
    assert done.stderr == ""
    assert done.stdout == "verified 5 records\n"


@pytest.mark.parametrize(
    "lines",
    [
        [*LINES[:4], LINES[4].replace(b"Alice", b"Malory"), *LINES[5:]],
        [*LINES[:4], *LINES[5:]],
        LINES[:-1],
        [LINES[0].replace(b'"since":0', b'"since":9'), *LINES[1:]],
        [*LINES[:3], LINES[3].replace(b"1700000800", b"1700000801"), *LINES[4:]],
    ],
    ids=["changed", "missing", "cut", "header", "checkpoint"],
)
def test_the_snippet_refuses_what_was_changed(tmp_path: Path, lines: list[bytes]) -> None:
    done = verify_by_page(tmp_path, lines)
    assert done.returncode == 1
    assert done.stdout == ""
