"""`helixflow usage` and `helixflow requests` against a scripted admin API."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from helixflow.transport.testing import Close, ScriptedUpstream, Send, answer, chunk

Run = Callable[..., Any]
FIGURES = {
    "requests": 3,
    "failed_requests": 1,
    "prompt_tokens": 10,
    "cached_tokens": 2,
    "completion_tokens": 5,
    "reasoning_tokens": 0,
    "cost": "0.0125",
}
REQUEST = {
    "call_id": "c" * 32,
    "request_id": "req_1",
    "admitted_at": "2026-11-23T09:30:05.125000Z",
    "model": "m\x1b[2J",
    "outcome": "failed",
    "error": "upstream_unavailable",
    "prompt_tokens": 12,
    "completion_tokens": 3,
    "duration_ms": None,
    "cost": "0.25",
    "tags": {"team": "search"},
}
EXPLANATION = {
    "call_id": "c" * 32,
    "request_id": "req_1",
    "admitted_at": "2026-11-23T09:30:05Z",
    "status": 502,
    "outcome": "failed",
    "error": "upstream_unavailable",
    "authorised": {"key_id": "key_1", "user_id": None},
    "limited": {"policies": ["lim_1", "bud_1"], "reserved_cost": "0.5"},
    "routed": {"deployment": "m/openai-1", "stream": True},
    "retried": [{"deployment": "m/openai-0", "error": "overloaded"}],
    "priced": {"cost": "0.25", "rates": {"input": "1.00", "tiers": [{"from_prompt_tokens": 9}]}},
}


def report(*groups: dict[str, str], cursor: str | None = None) -> Send:
    data = [{"group": group, **FIGURES} for group in groups]
    span = {"from": "2026-11-01T00:00:00Z", "to": "2026-12-01T00:00:00Z"}
    return answer(json.dumps({**span, "data": data, "total": FIGURES, "next_cursor": cursor}).encode())


@pytest.fixture
def ask(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command against a scripted server."""

    async def ask(upstream: ScriptedUpstream, *words: str) -> Any:
        monkeypatch.setenv("HELIXFLOW_BASE_URL", f"{upstream.base_url}/v1")
        monkeypatch.setenv("HELIXFLOW_API_KEY", "hfk_test")
        return await asyncio.to_thread(run, *words)

    return ask


def sent(upstream: ScriptedUpstream) -> list[tuple[str, dict[str, list[str]]]]:
    targets = [urlsplit(request.target) for request in upstream.requests]
    return [(target.path, parse_qs(target.query)) for target in targets]


async def test_usage_for_people_ends_with_the_total(ask: Run) -> None:
    group = {"day": "2026-11-23T00:00:00Z", "project": "proj_1"}
    async with ScriptedUpstream([[report(group)]]) as upstream:
        done = await ask(
            upstream, "usage", "show", "--group-by", "tag:a,b", "--group-by", "day,project", "--from", "2026-11-01",
            "--to", "2026-12-01", "--project", "proj_1", "--key", "key_1", "--user", "user_1", "--model", "m",
            "--operation", "embeddings", "--tag", "team=x",
        )  # fmt: skip
    assert done.code == 0, done.err
    lines = [line.split() for line in done.out.splitlines()]
    assert lines[0] == ["from", "2026-11-01", "00:00", "UTC", "to", "2026-12-01", "00:00", "UTC"]
    assert lines[2] == ["2026-11-23", "00:00", "UTC", "proj_1", "3", "1", "10", "2", "5", "0", "0.0125"]
    assert lines[3] == ["total", "3", "1", "10", "2", "5", "0", "0.0125"]
    assert sent(upstream) == [
        (
            "/api/v1/usage",
            {
                "group_by": ["day,project,tag:a,b"],
                "from": ["2026-11-01T00:00:00Z"],
                "to": ["2026-12-01T00:00:00Z"],
                "project_id": ["proj_1"],
                "key_id": ["key_1"],
                "user_id": ["user_1"],
                "model": ["m"],
                "operation": ["embeddings"],
                "tag": ["team=x"],
                "limit": ["100"],
            },
        )
    ]


async def test_more_rows_than_are_shown_are_announced(ask: Run) -> None:
    script = [[report(*[{"model": "m"}] * 100, cursor="a&b")], [report({"model": "n"}, cursor="more")]]
    async with ScriptedUpstream(script) as upstream:
        done = await ask(upstream, "usage", "show", "--group-by", "model", "--limit", "101")
    assert "There are more rows" in done.out
    assert [query.get("cursor") for _, query in sent(upstream)] == [None, ["a&b"]]
    assert [query["limit"] for _, query in sent(upstream)] == [["100"], ["1"]]


async def test_usage_for_programs_is_one_document(ask: Run) -> None:
    async with ScriptedUpstream([[report()]]) as upstream:
        done = await ask(upstream, "usage", "show", "--json")
    assert json.loads(done.out)["total"] == FIGURES
    assert sent(upstream)[0][1]["group_by"] == ["day"]


async def test_an_export_as_csv_is_what_the_server_sends(ask: Run, tmp_path: Path) -> None:
    out = tmp_path / "usage.csv"
    async with ScriptedUpstream([[answer(b"day,cost\r\n'=1,0.1\r\n")]]) as upstream:
        done = await ask(upstream, "usage", "export", "--output", str(out), "--group-by", "day")
    assert (done.code, done.out) == (0, "")
    assert out.read_bytes() == b"day,cost\r\n'=1,0.1\r\n"
    assert out.stat().st_mode & 0o777 == 0o600
    assert sent(upstream) == [("/api/v1/usage", {"group_by": ["day"], "format": ["csv"]})]


async def test_an_export_that_breaks_off_leaves_no_file(ask: Run, tmp_path: Path) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/csv\r\ntransfer-encoding: chunked\r\n\r\n"
    async with ScriptedUpstream([[Send(head), Send(chunk(b"day,cost\r\n")), Close()]]) as upstream:
        done = await ask(upstream, "usage", "export", "--output", str(tmp_path / "usage.csv"))
    assert done.code == 1
    assert list(tmp_path.glob("*usage*")) == []


async def test_an_export_as_json_has_all_pages(ask: Run, tmp_path: Path) -> None:
    out = tmp_path / "usage.json"
    async with ScriptedUpstream([[report({"day": "1"}, cursor="n")], [report({"day": "2"})]]) as upstream:
        done = await ask(upstream, "usage", "export", "--format", "json", "--output", str(out))
    assert done.code == 0, done.err
    exported = json.loads(out.read_bytes())
    assert [entry["group"] for entry in exported["data"]] == [{"day": "1"}, {"day": "2"}]
    assert exported.keys() == {"from", "to", "data", "total"}
    assert sent(upstream)[0][1]["group_by"] == ["day,project,model"]


async def test_requests_are_listed_for_people_and_programs(ask: Run) -> None:
    page = answer(json.dumps({"data": [REQUEST], "next_cursor": None}).encode())
    async with ScriptedUpstream([[page], [page]]) as upstream:
        words = ("requests", "list", "--outcome", "failed", "--model", "m", "--from", "2026-11-01")
        done = await ask(upstream, *words)
        programs = await ask(upstream, *words, "--json")
    assert "2026-11-23T09:30:05Z  req_1    m[2J   failed (upstream_unavailable)  12 + 3  –     0.25" in done.out
    assert json.loads(programs.out) == {"requests": [REQUEST]}
    path, query = sent(upstream)[0]
    assert path == "/api/v1/requests"
    assert query == {"from": ["2026-11-01T00:00:00Z"], "model": ["m"], "outcome": ["failed"], "limit": ["20"]}


async def test_one_request_is_shown(ask: Run) -> None:
    async with ScriptedUpstream([[answer(json.dumps(REQUEST).encode())]]) as upstream:
        done = await ask(upstream, "requests", "show", "req/1")
    assert sent(upstream)[0][0] == "/api/v1/requests/req%2F1"
    assert done.out.startswith(f"Request {'c' * 32}\n")
    assert "team=search" in done.out


async def test_a_request_is_explained_topic_by_topic(ask: Run) -> None:
    explanation = answer(json.dumps(EXPLANATION).encode())
    async with ScriptedUpstream([[explanation], [explanation]]) as upstream:
        done = await ask(upstream, "requests", "explain", "req_1")
        programs = await ask(upstream, "requests", "explain", "req_1", "--json")
    assert json.loads(programs.out) == EXPLANATION
    assert sent(upstream)[0][0] == "/api/v1/requests/req_1/explain"
    for line in (
        "502 failed (upstream_unavailable)",
        "  key_id: key_1",
        "  policies: lim_1, bud_1",
        "  deployment: m/openai-1",
        "  m/openai-0: overloaded",
        "  rates.input: 1.00",
        "  rates.tiers[0].from_prompt_tokens: 9",
    ):
        assert line in done.out
    assert "user_id" not in done.out
