from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helixflow.auth.master_key import FILE_NAME, load_master_key
from helixflow.core.errors import ExitCode, UserError
from helixflow.settings.tree import AuthSettings, Settings

DIGITS = "ab" * 32


def test_it_is_made_at_the_first_start_and_found_at_the_next(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    made = load_master_key(settings)
    path = settings.data_dir / FILE_NAME
    assert len(made.key) == 32 and path.stat().st_mode & 0o777 == 0o600
    assert load_master_key(settings) == made
    assert made.key.hex() not in repr(made)
    assert [found.name for found in settings.data_dir.iterdir()] == [FILE_NAME]


def test_two_starts_at_once_end_with_the_same(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    with ThreadPoolExecutor(8) as threads:
        keys = set(threads.map(lambda _: load_master_key(settings).key, range(8)))
    assert len(keys) == 1


def test_a_file_of_ones_own_may_be_read_by_its_group(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(f"{DIGITS}\n")
    settings = Settings(data_dir=tmp_path, auth=AuthSettings(master_key_file=path))
    path.chmod(0o640)
    assert load_master_key(settings).key == bytes.fromhex(DIGITS)
    assert not (tmp_path / FILE_NAME).exists()
    path.chmod(0o644)
    with pytest.raises(UserError, match="chmod"):
        load_master_key(settings)


def test_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(data_dir=tmp_path, auth=AuthSettings(master_key_env="MASTER"))
    monkeypatch.setenv("MASTER", DIGITS.upper())
    assert load_master_key(settings).key == bytes.fromhex(DIGITS)
    for bad in ("", "ab", DIGITS + "ab", "x" * 64, DIGITS[:-1] + "٣"):
        monkeypatch.setenv("MASTER", bad)
        with pytest.raises(UserError, match="MASTER") as caught:
            load_master_key(settings)
        assert caught.value.exit_code is ExitCode.CONFIG
        assert len(bad) < 64 or bad not in caught.value.message


def test_a_file_that_is_missing_or_spoilt_says_what_to_do(tmp_path: Path) -> None:
    missing = Settings(data_dir=tmp_path, auth=AuthSettings(master_key_file=tmp_path / "none"))
    with pytest.raises(UserError, match=r"no such file.*openssl rand -hex 32"):
        load_master_key(missing)
    (tmp_path / FILE_NAME).write_bytes(b"\xff" * 32)
    (tmp_path / FILE_NAME).chmod(0o600)
    with pytest.raises(UserError, match="openssl rand -hex 32") as caught:
        load_master_key(Settings(data_dir=tmp_path))
    assert caught.value.exit_code is ExitCode.CONFIG
