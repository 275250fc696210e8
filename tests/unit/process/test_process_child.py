import os
import tempfile
from pathlib import Path

import pytest

from helixflow.core.errors import ExitCode, UserError
from helixflow.process.child import ChildArguments, read_whole
from helixflow.settings.tree import Settings


def test_arguments_are_parsed() -> None:
    arguments = ChildArguments.parse(["--settings-fd", "5", "--listen-fd", "6", "--name", "gateway-0"])
    assert arguments == ChildArguments(settings_fd=5, listen_fd=6, name="gateway-0")


def test_settings_survive_the_way_through_the_descriptor(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    with tempfile.TemporaryFile() as file:
        file.write(settings.model_dump_json().encode())
        file.flush()
        assert ChildArguments(file.fileno()).load_settings() == settings
        assert ChildArguments(file.fileno()).load_settings() == settings, "every child reads the same descriptor"


def test_settings_that_do_not_fit_are_a_users_error() -> None:
    with tempfile.TemporaryFile() as file:
        file.write(b'{"unknown": 1}')
        file.flush()
        with pytest.raises(UserError) as caught:
            ChildArguments(file.fileno()).load_settings()
    assert caught.value.exit_code is ExitCode.CONFIG


def test_ready_is_one_byte_and_a_lost_launcher_is_no_error() -> None:
    read, write = os.pipe()
    ChildArguments(0, ready_fd=write).report_ready()
    assert os.read(read, 10) == b"1"
    os.close(read)
    read, write = os.pipe()
    os.close(read)
    ChildArguments(0, ready_fd=write).report_ready()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.close(write)


def test_read_whole_begins_at_the_beginning() -> None:
    with tempfile.TemporaryFile() as file:
        file.write(b"x" * 100_000)
        file.flush()
        assert read_whole(file.fileno()) == b"x" * 100_000
