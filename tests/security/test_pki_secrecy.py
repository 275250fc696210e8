"""Private keys: in files of mode 0600 and nowhere else, whatever is done and whatever goes wrong."""

import base64
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helixflow.pki.certificates import KeyPair

ACTS: tuple[tuple[str, ...], ...] = (
    ("init",),
    ("show", "--json"),
    ("rotate",),
    ("revoke", "console"),
    ("rotate", "--ca", "--settle", "0"),
    ("init",),
)


def helixflow(data_dir: Path, *words: str) -> str:
    """Everything that the command writes, tracebacks included."""
    argv = [sys.executable, "-m", "helixflow.cli.main", "--debug", "--data-dir", str(data_dir), "pki", *words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr


def secrets_in(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Each file with a key, and the forms in which the key could show up somewhere."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and b"PRIVATE KEY" in (pem := path.read_bytes()):
            key = KeyPair.parse(pem)
            number = key.key.private_numbers().private_value  # type: ignore[union-attr]
            lines = key.key_pem().decode().splitlines()[1:-1]
            raw = number.to_bytes(32, "big")
            yield path, [*lines, f"{number:x}", str(number), base64.b64encode(raw).decode(), raw.hex(":")]


def test_keys_are_in_no_output_and_no_other_file(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    outputs, forms = "", set()
    for act in ACTS:
        outputs += helixflow(data_dir, *act)
        for path, shown in secrets_in(data_dir):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
            forms.update(shown)
    # The authority twice, five services several times.
    assert len(forms) > 50
    assert not [form for form in forms if form in outputs]
    others = [
        path
        for path in data_dir.rglob("*")
        if path.is_file() and b"PRIVATE KEY" not in path.read_bytes() and path.name != "lock"
    ]
    assert {path.name for path in others} == {"ca.crt", "issued.jsonl", "revoked.jsonl", "retired.jsonl"}
    for path in others:
        assert not [form for form in forms if form in path.read_text()], path


@pytest.mark.parametrize("name", ["ca.key", "services/gateway.pem"])
def test_a_damaged_key_is_not_quoted(tmp_path: Path, name: str) -> None:
    data_dir = tmp_path / "data"
    helixflow(data_dir, "init")
    path = data_dir / "pki" / name
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[1][:-5] + "\n", *lines[2:]]))
    written = helixflow(data_dir, "revoke", "gateway") + helixflow(data_dir, "show")
    assert str(path) in written
    assert lines[1][:-5] not in written
    assert lines[2].strip() not in written
