"""`helixflow auth rotate-signing-key` against a scripted admin API, and `replace-master-key` on a real database."""

import asyncio
import json
from pathlib import Path

import pytest

from helixflow.auth.service import create_auth
from helixflow.core.errors import ExitCode
from helixflow.settings.tree import Settings
from helixflow.transport.testing import ScriptedUpstream, answer
from tests.integration.cli.conftest import Run

ROTATED = {"kid": "key-2", "others_expire_at": "2026-11-23T03:04:05Z"}


@pytest.fixture
def sealed(data_dir: Path) -> Path:
    """A data directory from which something has been served."""

    async def run() -> None:
        await (await create_auth(Settings(data_dir=data_dir), None)).close()

    asyncio.run(run())
    return data_dir


async def test_a_new_signing_key(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    body = answer(json.dumps(ROTATED).encode())
    async with ScriptedUpstream([[body], [body], [body]]) as upstream:
        monkeypatch.setenv("HELIXFLOW_BASE_URL", upstream.base_url)
        monkeypatch.setenv("HELIXFLOW_API_KEY", "hfk_test")
        done = await asyncio.to_thread(run, "auth", "rotate-signing-key")
        as_json = await asyncio.to_thread(run, "auth", "rotate-signing-key", "--json")
        at_once = await asyncio.to_thread(run, "auth", "rotate-signing-key", "--revoke-others")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("key-2 signs in a few seconds") and "2026-11-23 03:04 UTC" in done.out
    assert json.loads(as_json.out) == ROTATED
    sent = upstream.requests[0]
    assert (sent.method, sent.target) == ("POST", "/api/v1/signing-keys/rotate")
    assert sent.headers["authorization"] == "Bearer hfk_test"
    assert (at_once.code, at_once.err) == (0, "")
    assert at_once.out.startswith("key-2 signs from now on") and "have ended" in at_once.out
    assert [json.loads(request.body) for request in upstream.requests] == [
        {"revoke_others": False},
        {"revoke_others": False},
        {"revoke_others": True},
    ]


def test_a_new_master_key(run: Run, sealed: Path, tmp_path: Path) -> None:
    new = tmp_path / "next.key"
    done = run("auth", "replace-master-key", "--new-key-file", str(new))
    assert (done.code, done.err) == (0, "")
    counts, file, kept, copy = done.out.splitlines()
    assert counts == (
        "Sealed anew: token keys 0, audit keys 0, second factors 0, remembered answers 0, serving configurations 1."
    )
    assert file == f"The master key is in {sealed / 'master.key'}."
    assert str(sealed / "master.key.old") in kept and str(new) in copy
    assert new.read_text().strip() not in done.out
    again = run("auth", "replace-master-key", "--new-key-file", str(new), "--json")
    assert json.loads(again.out) == {"counts": {}, "file": str(sealed / "master.key"), "kept": None}


def test_a_lost_master_key(run: Run, sealed: Path, tmp_path: Path) -> None:
    (sealed / "master.key").unlink()
    done = run("auth", "replace-master-key", "--new-key-file", str(tmp_path / "next.key"))
    assert (done.code, done.err.count("\n")) == (ExitCode.CONFIG, 1)
    done = run("auth", "replace-master-key", "--new-key-file", str(tmp_path / "next.key"), "--lost")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("Given up: token keys 0") and "sessions 0" in done.out


def test_a_place_of_ones_own_is_named(run: Run, sealed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("auth", "replace-master-key", "--new-key-file")
    place = tmp_path / "mounted"
    (sealed / "master.key").rename(place)
    monkeypatch.setenv("HELIXFLOW_AUTH__MASTER_KEY_FILE", str(place))
    done = run(*words, str(tmp_path / "second"))
    assert f"put {tmp_path / 'second'} in place of {place}" in done.out
    # In its place, it can be replaced again, and the next one is for a variable.
    (tmp_path / "second").replace(place)
    monkeypatch.delenv("HELIXFLOW_AUTH__MASTER_KEY_FILE")
    monkeypatch.setenv("HELIXFLOW_AUTH__MASTER_KEY_ENV", "MASTER")
    monkeypatch.setenv("MASTER", place.read_text())
    done = run(*words, str(tmp_path / "third"))
    assert f"set MASTER to what {tmp_path / 'third'} holds" in done.out
    assert not (sealed / "master.key").exists()


def test_options_of_the_service_do_not_go_with_a_command(run: Run) -> None:
    done = run("auth", "--port", "1", "rotate-signing-key")
    assert (done.code, done.err.count("\n")) == (ExitCode.USAGE, 1)
