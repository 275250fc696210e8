import stat
from pathlib import Path

import pytest

from helixflow.core.errors import ExitCode, UserError
from helixflow.rpc.channels import target_of
from helixflow.rpc.sockets import MAX_PATH_BYTES, clear_stale_socket, prepare_run_dir, socket_path


def test_a_path_too_long_for_the_system_is_refused_with_what_to_do() -> None:
    fits = Path("/" + "x" * (MAX_PATH_BYTES - len("/" + "/auth.sock")))
    assert len(str(socket_path(fits, "auth"))) == MAX_PATH_BYTES
    with pytest.raises(UserError, match=r"by 1 bytes; choose a shorter data_dir") as caught:
        socket_path(Path(f"{fits}x"), "auth")
    assert caught.value.exit_code is ExitCode.CONFIG


def test_the_length_is_counted_in_bytes() -> None:
    with pytest.raises(UserError):
        socket_path(Path("/" + "é" * 60), "auth")


def test_characters_with_a_meaning_in_uris_are_quoted() -> None:
    assert target_of(Path("/a b#c?d%e/x.sock")) == "unix:/a%20b%23c%3Fd%25e/x.sock"


def test_the_run_dir_is_made_and_kept_private(tmp_path: Path) -> None:
    run_dir = tmp_path / "data" / "run"
    prepare_run_dir(run_dir)
    run_dir.chmod(0o755)
    prepare_run_dir(run_dir)
    assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700


def test_a_run_dir_that_others_can_write_is_refused(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    run_dir.chmod(0o770)
    with pytest.raises(UserError, match="other users can write there"):
        prepare_run_dir(run_dir)


def test_a_run_dir_behind_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="symbolic link"):
        prepare_run_dir(tmp_path / "run")


def test_a_file_in_the_place_of_a_socket_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "auth.sock"
    path.write_text("precious")
    with pytest.raises(UserError, match="in the way"):
        clear_stale_socket(path)
    assert path.read_text() == "precious"
    clear_stale_socket(tmp_path / "missing.sock")
