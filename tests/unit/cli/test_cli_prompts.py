"""Answers of programs: lines of standard input. Those of people: tests/integration/cli/test_cli_administration.py."""

import io
from collections.abc import Callable

import pytest

from helixflow.cli.prompts import ask_line, ask_new_password, ask_secret, ask_whether
from helixflow.core.errors import ExitCode, UserError
from tests.unit.cli.conftest import Run


@pytest.fixture
def type_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    return lambda typed: monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))


def test_each_answer_is_a_line(type_in: Callable[[bytes], None]) -> None:
    type_in(b" ada@example.com \r\n pass word \r\nnew\nlast")
    assert ask_line("E-mail") == "ada@example.com"
    assert ask_secret("Password") == " pass word "
    assert not ask_whether("Really?")
    assert ask_new_password("New password") == "new"
    assert ask_secret("Token") == "last"


@pytest.mark.parametrize(("typed", "problem"), [(b"", "has ended"), (b"\xff\n", "is not UTF-8")])
def test_what_is_missing_is_named(type_in: Callable[[bytes], None], typed: bytes, problem: str) -> None:
    type_in(typed)
    with pytest.raises(UserError, match=f"^Password: standard input {problem}") as caught:
        ask_secret("Password")
    assert caught.value.exit_code is ExitCode.USAGE


@pytest.mark.parametrize("words", ["redeem", "login", "password", "mfa enrol", "mfa disable", "mfa recovery-codes"])
def test_no_secret_is_taken_from_the_command_line(run: Run, type_in: Callable[[bytes], None], words: str) -> None:
    type_in(b"")
    assert run(*words.split(), "hft_secret").code == ExitCode.USAGE
    done = run(*words.split())
    assert (done.code, done.out, done.err.count("\n")) == (ExitCode.USAGE, "", 1)
    assert "standard input has ended" in done.err
