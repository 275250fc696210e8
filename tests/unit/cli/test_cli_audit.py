"""`helixflow audit verify`: what it prints, exits with and refuses, without any server."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.harness.audit import build_export, build_records, new_key, pem_of
from tests.unit.cli.conftest import Run

KEY = new_key()
LINES = build_export(build_records(3), KEY, checkpoints=(2,))


@pytest.fixture
def export(tmp_path: Path) -> Path:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(b"".join(LINES))
    return path


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key.pem"
    path.write_text(pem_of(KEY))
    return path


def test_an_export_that_verifies(run: Run, export: Path) -> None:
    done = run("audit", "verify", str(export))
    assert done.code == 0
    assert done.out.startswith("verified: records 1 to 3 of org_1, 1 checkpoints, exported 2023-11-14 22:28 UTC\n")
    assert f"signed with {KEY.kid}" in done.out
    assert "by whom is not shown" in done.out


def test_an_export_that_verifies_with_a_key_of_ones_own(run: Run, export: Path, key_file: Path) -> None:
    done = run("audit", "verify", str(export), "--key", str(key_file))
    assert done.code == 0
    assert "by whom" not in done.out


def test_an_export_that_somebody_else_signed(run: Run, export: Path, key_file: Path) -> None:
    key_file.write_text(pem_of(new_key()))
    done = run("audit", "verify", str(export), "--key", str(key_file))
    assert done.code == 1
    assert f"signed with an unknown key ({KEY.kid})" in done.err


def test_the_first_bad_record_is_named(run: Run, export: Path) -> None:
    export.write_bytes(b"".join(LINES).replace(b"proj_2", b"proj_9"))
    done = run("audit", "verify", str(export))
    assert done.code == 1
    assert done.out == ""
    assert done.err == f"helixflow: {export}: line 3, record 2: its hash does not match: a field was changed\n"


def test_json_for_programs(run: Run, export: Path) -> None:
    good = json.loads(run("audit", "verify", str(export), "--json").out)
    assert (good["valid"], good["records"], good["kids"], good["key_pinned"]) == (True, 3, [KEY.kid], False)
    export.write_bytes(b"".join(LINES[:-1]))
    done = run("audit", "verify", str(export), "--json")
    assert done.code == 1
    assert json.loads(done.out) == {
        "valid": False,
        "line": 6,
        "sequence": 4,
        "problem": "the end is missing: the file was cut off, or the export broke off",
    }


def test_standard_input(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"".join(LINES))))
    assert run("audit", "verify", "-").code == 0


def test_files_that_cannot_be_read(run: Run, tmp_path: Path, export: Path) -> None:
    done = run("audit", "verify", str(tmp_path / "none"))
    assert (done.code, done.err) == (1, f"helixflow: {tmp_path / 'none'}: No such file or directory\n")
    for content in (b"nothing", b"\xff\x00", b"{}", b"a" * 100_000):
        (tmp_path / "key").write_bytes(content)
        done = run("audit", "verify", str(export), "--key", str(tmp_path / "key"))
        assert done.code == 2
        assert done.err.startswith(f"helixflow: --key {tmp_path / 'key'}: ")


def test_what_a_file_says_does_not_steer_the_terminal(run: Run, export: Path) -> None:
    export.write_bytes(LINES[0].replace(b'"version":1', b'"version":1').replace(b"helixflow-audit-log", b"\\u001b[2J"))
    done = run("audit", "verify", str(export))
    assert done.code == 1
    assert "\x1b" not in done.err
