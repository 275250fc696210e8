"""`helixflow audit list` and `export` against a scripted admin API."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from helixflow.cli.moments import parse_past
from helixflow.core.errors import ExitCode, UserError
from helixflow.transport.testing import ScriptedUpstream, Send, answer
from tests.harness.audit import build_export, build_records, new_key

EXPORT = b"".join(build_export(build_records(3), new_key()))
NOW = 1_700_000_000
RECORD = {
    "sequence": 7,
    "at": "2026-11-23T09:30:05Z",
    "actor_kind": "account",
    "actor_id": "user_1",
    "actor_name": "Ada\x1b[2J",
    "action": "create_key",
    "outcome": "denied",
    "reason": "not_found",
    "target_kind": "key",
    "target_id": "key_1",
    "address": None,
}
Run = Callable[..., Any]


def page(*records: dict[str, Any], cursor: str | None = None) -> Send:
    return answer(json.dumps({"data": records, "next_cursor": cursor}).encode())


def problem(status: str, detail: str) -> Send:
    return answer(json.dumps({"type": "x", "title": "No", "detail": detail}).encode(), status=status)


@pytest.fixture
def ask(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command against a scripted server."""

    async def ask(upstream: ScriptedUpstream, *words: str) -> Any:
        monkeypatch.setenv("HELIXFLOW_BASE_URL", f"{upstream.base_url}/v1")
        monkeypatch.setenv("HELIXFLOW_API_KEY", "hfk_test")
        # Never for an administration.
        monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
        return await asyncio.to_thread(run, "audit", *words)

    return ask


async def test_a_list_for_people(ask: Run) -> None:
    async with ScriptedUpstream([[page(RECORD)]]) as upstream:
        done = await ask(upstream, "list", "--outcome", "denied", "--target", "key_1", "--since", "2026-11-01")
    assert done.code == 0
    assert "2026-11-23T09:30:05Z  Ada[2J  create_key  key key_1  denied (not_found)" in done.out
    (sent,) = upstream.requests
    assert sent.headers["authorization"] == "Bearer hfk_test"
    assert urlsplit(sent.target).path == "/api/v1/audit/records"
    assert parse_qs(urlsplit(sent.target).query) == {
        "outcome": ["denied"],
        "target_id": ["key_1"],
        "since": ["2026-11-01T00:00:00Z"],
        "limit": ["20"],
    }


async def test_a_long_list_is_read_page_by_page(ask: Run) -> None:
    first, second = [RECORD] * 100, [RECORD] * 50
    async with ScriptedUpstream([[page(*first, cursor="a&b")], [page(*second, cursor="more")]]) as upstream:
        done = await ask(upstream, "list", "--limit", "150", "--json")
    assert len(json.loads(done.out)["records"]) == 150
    queries = [parse_qs(urlsplit(request.target).query) for request in upstream.requests]
    assert queries == [{"limit": ["100"]}, {"limit": ["50"], "cursor": ["a&b"]}]


async def test_an_export_into_a_file_is_whole_and_private(ask: Run, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "audit.jsonl"
    async with ScriptedUpstream([[answer(EXPORT)]]) as upstream:
        done = await ask(upstream, "export", "--out", str(out), "--installation", "--until", "2027-01-01")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert out.read_bytes() == EXPORT
    assert out.stat().st_mode & 0o777 == 0o600
    assert run("audit", "verify", str(out)).code == 0
    assert parse_qs(urlsplit(upstream.requests[0].target).query) == {
        "until": ["2027-01-01T00:00:00Z"],
        "installation": ["true"],
    }


async def test_an_export_that_breaks_off_leaves_no_file(ask: Run, tmp_path: Path) -> None:
    out = tmp_path / "audit.jsonl"
    async with ScriptedUpstream([[answer(EXPORT[:-5])]]) as upstream:
        done = await ask(upstream, "export", "--out", str(out))
    assert (done.code, done.err) == (1, "helixflow: The export broke off; export again.\n")
    assert list(tmp_path.glob("*audit*")) == []


async def test_the_servers_own_words_come_through(ask: Run) -> None:
    async with ScriptedUpstream([[problem("403 Forbidden", "Not permitted: this needs audit:read.")]]) as upstream:
        done = await ask(upstream, "list")
    assert (done.code, done.err) == (1, "helixflow: Not permitted: this needs audit:read.\n")


def test_without_a_service_it_says_how_to_start_one(run: Run) -> None:
    done = run("audit", "list")
    assert done.code == ExitCode.UNAVAILABLE
    assert "helixflow serve" in done.err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7d", "2023-11-07T22:13:20Z"),
        ("12h", "2023-11-14T10:13:20Z"),
        ("2w", "2023-10-31T22:13:20Z"),
        ("999999w", "1970-01-01T00:00:00Z"),
        ("2027-01-31", "2027-01-31T00:00:00Z"),
        ("2027-01-31T12:00+02:00", "2027-01-31T10:00:00Z"),
    ],
)
def test_times_as_people_write_them(text: str, expected: str) -> None:
    assert parse_past(text, NOW, "--since") == expected


@pytest.mark.parametrize("text", ["", "yesterday", "7", "-7d", "2027-13-01", "0001-01-01T00:00+23:00"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--since"):
        parse_past(text, NOW, "--since")
