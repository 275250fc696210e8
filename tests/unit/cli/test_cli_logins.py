import threading
from pathlib import Path

import pytest

from helixflow.cli.administration import cell, part
from helixflow.cli.logins import FILE_NAME, Login, Logins
from helixflow.cli.moments import parse_span
from helixflow.core.errors import UserError

LOGIN = Login("ada@example.com", "a.b.c", 100.0, "hfr_1", 200.0)


def test_sessions_are_kept_by_server_and_for_their_owner_alone(tmp_path: Path) -> None:
    logins = Logins(tmp_path / "config")
    assert logins.find("http://127.0.0.1:8080") is None
    with logins.locked():
        logins.keep("http://127.0.0.1:8080", LOGIN)
        logins.keep("https://example.com", LOGIN)
        logins.forget("https://example.com")
        logins.forget("https://never.example.com")
    assert logins.find("http://127.0.0.1:8080") == LOGIN
    assert logins.find("https://example.com") is None
    assert (tmp_path / "config" / FILE_NAME).stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "config").stat().st_mode & 0o777 == 0o700


def test_two_commands_do_not_change_them_at_once(tmp_path: Path) -> None:
    order = []

    def other() -> None:
        with Logins(tmp_path).locked():
            order.append("other")

    with Logins(tmp_path).locked():
        thread = threading.Thread(target=other)
        thread.start()
        order.append("this one")
    thread.join(10)
    assert order == ["this one", "other"]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("{")
    with pytest.raises(UserError, match=f"{FILE_NAME}: is damaged"):
        Logins(tmp_path).find("x")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (True, "yes"),
        (["a", "b"], "a, b"),
        ("2026-11-23T09:30:15Z", "2026-11-23 09:30 UTC"),
        ("not a time at all..", "not a time at all.."),
        (3, "3"),
    ],
)
def test_cells(value: object, shown: str) -> None:
    assert cell(value) == shown


def test_an_id_cannot_leave_its_place_in_a_path() -> None:
    assert part("../keys?x#y") == "..%2Fkeys%3Fx%23y"
    assert part("") == "%20"


@pytest.mark.parametrize(("text", "seconds"), [("0h", 0), ("12h", 43_200), ("2W", 1_209_600)])
def test_spans(text: str, seconds: int) -> None:
    assert parse_span(text, "--overlap") == seconds
    with pytest.raises(UserError, match="--overlap"):
        parse_span("soon", "--overlap")
