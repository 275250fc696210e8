"""Answers of providers on their way to the client, seen on the wire from both sides."""

import asyncio
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from helixflow.gateway import keepalive
from helixflow.transport.testing import (
    LAST_CHUNK,
    Close,
    Reset,
    ScriptedUpstream,
    Send,
    Step,
    Wait,
    answer,
    chunk,
    event_stream,
)
from tests.harness.gateway import provider, run_gateway
from tests.harness.wire import LIMIT_S, Answer, request

HELLO = b'{"model":"m","messages":[{"role":"user","content":"hi"}]}'
STREAM = HELLO[:-1] + b',"stream":true}'
WITH_USAGE = STREAM[:-1] + b',"stream_options":{"include_usage":true}}'
DONE = b"data: [DONE]\n\n"


def event(delta: Any = None, *, finish: str | None = None, usage: Any = ..., **more: Any) -> bytes:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    fields = {"id": "chatcmpl-9", "object": "chat.completion.chunk", "created": 1, "model": "their-m", **more}
    fields["choices"] = choices
    if usage is not ...:
        fields["usage"] = usage
    return b"data: " + json.dumps(fields, separators=(",", ":")).encode() + b"\n\n"


ROLE = event({"role": "assistant", "content": ""})
HEL = event({"content": "Hel"})
LO = event({"content": "lo"})
STOP = event({}, finish="stop")
USAGE = event(usage={"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9})
GOOD = event_stream([ROLE, HEL, LO, STOP, USAGE, DONE])
WHOLE = answer(
    b'{"id":"x-1","object":"chat.completion","created":1,"model":"their-m","choices":[{"index":0,"message":'
    b'{"role":"assistant","content":"Hello"},"finish_reason":"stop"}],"usage":{"prompt_tokens":7,"completion_tokens":2}}',
    headers=[("content-type", "application/json")],
)


async def converse(
    tmp_path: Path, scripts: Iterable[Sequence[Step]], body: bytes, *, others: Iterable[Sequence[Step]] | None = None
) -> tuple[Answer, ScriptedUpstream, ScriptedUpstream]:
    """One question to a gateway before one or two upstreams."""
    async with ScriptedUpstream(scripts) as first, ScriptedUpstream(others or []) as second:
        upstreams = [first] if others is None else [first, second]
        deployments = [provider(f"{u.base_url}/v1", model="their-m", tier=n) for n, u in enumerate(upstreams)]
        async with run_gateway(tmp_path, {"m": deployments}) as gateway:
            return await gateway.chat(body), first, second


def figure(metrics: str, name: str, labels: dict[str, str]) -> float:
    """The value of the one series with this name and at least these labels."""
    families = text_string_to_metric_families(metrics)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    found = [sample.value for sample in samples if labels.items() <= sample.labels.items()]
    assert len(found) == 1, found
    return found[0]


def text_of(answer: Answer) -> str:
    return "".join(c["choices"][0]["delta"].get("content", "") for c in answer.chunks if c["choices"])


async def test_a_whole_answer_passes_with_our_names(tmp_path: Path) -> None:
    got, upstream, _ = await converse(tmp_path, [[WHOLE]], HELLO[:-1] + b',"vendor_option":{"a":[1.50]}}')
    assert got.status == 200
    assert got.json["model"] == "m"
    assert got.json["id"].startswith("chatcmpl-")
    assert got.json["choices"][0]["message"]["content"] == "Hello"
    assert got.headers["content-type"] == "application/json"
    assert got.headers["x-helixflow-model"] == "m"
    assert got.headers["x-helixflow-deployment"] == "m/openai-0"
    assert int(got.headers["openai-processing-ms"]) >= 0
    sent = upstream.requests[0]
    assert sent.target == "/v1/chat/completions"
    assert json.loads(sent.body)["model"] == "their-m"
    assert b'"vendor_option":{"a":[1.50]}' in sent.body
    assert "authorization" not in sent.headers


async def test_a_stream_passes_with_our_names_and_without_usage(tmp_path: Path) -> None:
    got, upstream, _ = await converse(tmp_path, [GOOD], STREAM)
    assert got.status == 200
    assert got.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert got.headers["cache-control"] == "no-cache"
    assert got.headers["x-accel-buffering"] == "no"
    assert text_of(got) == "Hello"
    assert {c["model"] for c in got.chunks} == {"m"}
    assert {c["id"] for c in got.chunks} == {"chatcmpl-9"}
    assert all("usage" not in c for c in got.chunks)
    assert json.loads(upstream.requests[0].body)["stream_options"] == {"include_usage": True}


async def test_include_usage_gives_nulls_and_the_numbers_last(tmp_path: Path) -> None:
    got, _, _ = await converse(tmp_path, [GOOD], WITH_USAGE)
    assert [c["usage"] for c in got.chunks[:-1]] == [None] * 4
    assert got.chunks[-1]["choices"] == []
    assert got.chunks[-1]["usage"]["total_tokens"] == 9


async def test_no_token_waits_for_the_next(tmp_path: Path) -> None:
    held = asyncio.Event()
    script = [*event_stream([ROLE, HEL], end=False), Wait(held), *map(Send, [chunk(LO + STOP + DONE), LAST_CHUNK])]
    async with (
        ScriptedUpstream([script]) as upstream,
        run_gateway(tmp_path, {"m": [provider(f"{upstream.base_url}/v1")]}) as gateway,
        await gateway.connect() as wire,
    ):
        wire.send(gateway.chat_request(STREAM))
        await wire.read_head()
        first = await wire.read_chunk()
        assert first is not None
        assert b'"Hel"' in first
        held.set()
        rest = await wire.read_chunk()
        assert rest is not None
        assert rest.endswith(DONE)
        assert await wire.read_chunk() == b""
        assert (await wire.ask(request("GET", "/livez"))).status == 200


@pytest.mark.parametrize(
    "script",
    [
        [Send(b"garbage\r\n\r\n"), Close()],
        [Close()],
        [Reset()],
        [answer(b"<html>", headers=[("content-type", "text/html")])],
        [answer(b"[]")],
        [answer(b'{"detail":"x"}')],
        [answer(b'{"choices":')],
        event_stream([b"data: {oops\n\n"]),
        event_stream([ROLE]),
        event_stream([]),
        event_stream([ROLE, b'data: {"error":{"message":"secret of theirs","code":500}}\n\n']),
        [Send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nshort"), Close()],
    ],
)
@pytest.mark.parametrize("body", [HELLO, STREAM])
async def test_rubbish_from_an_upstream_is_502(tmp_path: Path, script: list[Step], body: bytes) -> None:
    got, _, _ = await converse(tmp_path, [script, script], body)
    assert got.status == 502
    assert got.error["type"] == "api_error"
    assert got.error["code"] in ("upstream_invalid_response", "upstream_unavailable")
    assert "secret" not in got.error["message"]


@pytest.mark.parametrize(
    ("status", "body", "expected", "code", "says"),
    [
        ("400 Bad Request", b'{"error":{"message":"bad top_k","param":"top_k","code":"odd"}}', 400, "odd", "bad top_k"),
        ("400 Bad Request", b'{"error":{"message":"bad","code":400}}', 400, None, "bad"),
        ("400 Bad Request", b'{"error":"plain words"}', 400, None, "plain words"),
        ("400 Bad Request", b"<html>", 400, None, "refused"),
        ("400 Bad Request", b'{"error":{"message":"long","code":"context_length_exceeded"}}', 400,
         "context_length_exceeded", "long"),
        ("422 Unprocessable", b'{"error":{"message":"bad"}}', 400, None, "bad"),
        ("413 Too Large", b"", 413, "request_too_large", "refused"),
        ("401 Unauthorized", b'{"error":{"message":"key sk-123 is bad"}}', 502, "upstream_unavailable", "credentials"),
        ("403 Forbidden", b"", 502, "upstream_unavailable", "credentials"),
        ("404 Not Found", b"", 502, "upstream_unavailable", "does not know"),
        ("429 Too Many", b"", 429, "rate_limit_exceeded", "limiting"),
        ("500 Oops", b'{"error":{"message":"stack trace"}}', 502, "upstream_unavailable", "500"),
        ("503 Busy", b"", 503, "overloaded", "overloaded"),
        ("529 Busy", b"", 503, "overloaded", "overloaded"),
        ("504 Late", b"", 504, "deadline_exceeded", "in time"),
        ("302 Found", b"", 502, "upstream_unavailable", "302"),
    ],
)  # fmt: skip
async def test_statuses_of_an_upstream(
    tmp_path: Path, status: str, body: bytes, expected: int, code: str | None, says: str
) -> None:
    got, _, _ = await converse(tmp_path, [[answer(body, status=status, headers=[("retry-after", "7")])]], STREAM)
    assert got.status == expected
    assert got.error["code"] == code
    assert says in got.error["message"]
    assert "sk-123" not in got.error["message"]
    if expected in (429, 503):
        assert got.headers["retry-after"] == "7"


@pytest.mark.parametrize("value", ["nan", "-1", "soon", "Wed, 21 Oct 2065 07:28:00 GMT", "1e9", "0", ""])
async def test_an_odd_retry_after_becomes_a_sane_one(tmp_path: Path, value: str) -> None:
    script = [answer(b"", status="429 Too Many", headers=[("retry-after", value)])]
    got, _, _ = await converse(tmp_path, [script], HELLO)
    assert got.status == 429
    assert 1 <= int(got.headers["retry-after"]) <= 600


@pytest.mark.parametrize(
    "script",
    [
        [Reset()],
        [answer(b"", status="503 Busy")],
        [answer(b"", status="429 Too Many")],
        [answer(b"", status="500 Oops")],
        [answer(b"", status="401 No")],
        event_stream([ROLE, b": ping\n\n"]),
        [*event_stream([ROLE], end=False), Reset()],
        event_stream([b'data: {"error":{"message":"x"}}\n\n']),
    ],
)
async def test_a_failure_before_the_first_content_is_tried_elsewhere(tmp_path: Path, script: list[Step]) -> None:
    got, first, second = await converse(tmp_path, [script], STREAM, others=[GOOD])
    assert text_of(got) == "Hello"
    assert got.headers["x-helixflow-deployment"] == "m/openai-1"
    assert len(first.requests) == len(second.requests) == 1
    assert sum("role" in c["choices"][0]["delta"] for c in got.chunks if c["choices"]) == 1


async def test_a_callers_mistake_is_not_tried_elsewhere(tmp_path: Path) -> None:
    script = [answer(b'{"error":{"message":"bad"}}', status="400 Bad Request")]
    got, _, second = await converse(tmp_path, [script], STREAM, others=[GOOD])
    assert got.status == 400
    assert not second.requests


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ([*event_stream([ROLE, HEL], end=False), Reset()], "upstream_invalid_response"),
        ([*event_stream([ROLE, HEL], end=False), Close()], "upstream_invalid_response"),
        (event_stream([ROLE, HEL]), "upstream_invalid_response"),
        (event_stream([ROLE, HEL, STOP]), "upstream_invalid_response"),
        (event_stream([ROLE + HEL + b"data: {oops\n\n"]), "upstream_invalid_response"),
        (event_stream([ROLE, HEL, b'data: {"error":{"message":"secret","code":1}}\n\n']), "upstream_unavailable"),
        (event_stream([ROLE + HEL + b'data: {"error":{"message":"secret"}}\n\n' + DONE]), "upstream_unavailable"),
    ],
)
async def test_a_failure_after_the_first_content_is_one_error_event_at_the_end(
    tmp_path: Path, script: list[Step], code: str
) -> None:
    got, _, second = await converse(tmp_path, [script], STREAM, others=[GOOD])
    assert got.status == 200
    assert got.complete
    assert b'"Hel"' in got.body
    errors = [json.loads(e) for e in got.events if b'"error"' in e]
    assert len(errors) == 1
    assert json.loads(got.events[-1]) == errors[0]
    assert errors[0]["error"]["code"] == code
    assert set(errors[0]["error"]) == {"message", "type", "param", "code"}
    assert b"[DONE]" not in got.body
    assert b"secret" not in got.body
    assert not second.requests


async def test_what_follows_the_end_is_dropped(tmp_path: Path) -> None:
    got, _, _ = await converse(tmp_path, [event_stream([ROLE, HEL, STOP + DONE + LO, LO])], STREAM)
    assert got.body.endswith(DONE)
    assert text_of(got) == "Hel"


@pytest.mark.parametrize("body", [HELLO, STREAM])
@pytest.mark.parametrize("started", [False, True])
async def test_a_client_that_leaves_closes_the_upstream_at_once(tmp_path: Path, body: bytes, started: bool) -> None:
    never = asyncio.Event()
    head = event_stream([ROLE, HEL], end=False) if started else []
    async with (
        ScriptedUpstream([[*head, Wait(never)]]) as upstream,
        run_gateway(tmp_path, {"m": [provider(f"{upstream.base_url}/v1")]}) as gateway,
    ):
        wire = await gateway.connect()
        wire.send(gateway.chat_request(body))
        await upstream.arrival(1)
        if started and body is STREAM:
            await wire.read_head()
        wire.drop()
        async with asyncio.timeout(LIMIT_S):
            await upstream.connections[0].lost.wait()
        async with asyncio.timeout(LIMIT_S):
            while gateway.app.in_flight:
                await asyncio.sleep(0)
        metrics = (await gateway.ask("GET", "/metrics")).body.decode()
        labels = {"operation": "chat/completions", "status": "499"}
        assert figure(metrics, "helixflow_requests_total", labels) == 1


@pytest.mark.parametrize("body", [HELLO, STREAM])
async def test_so_does_one_that_has_sent_further_requests(tmp_path: Path, body: bytes) -> None:
    async with (
        ScriptedUpstream([[Wait(asyncio.Event())]]) as upstream,
        run_gateway(tmp_path, {"m": [provider(f"{upstream.base_url}/v1")]}) as gateway,
    ):
        wire = await gateway.connect()
        wire.send(gateway.chat_request(body) * 3)
        await upstream.arrival(1)
        wire.drop()
        async with asyncio.timeout(LIMIT_S):
            await upstream.connections[0].lost.wait()
        async with asyncio.timeout(LIMIT_S):
            while gateway.app.in_flight:
                await asyncio.sleep(0)
        assert len(upstream.requests) == 1


async def test_keep_alive_comments_while_the_upstream_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keepalive, "INTERVAL_S", 0.01)
    ready = asyncio.Event()
    script: list[Step] = [Wait(ready), *GOOD]
    failing: list[Step] = [Wait(ready), answer(b'{"error":{"message":"bad"}}', status="400 Bad Request")]
    async with (
        ScriptedUpstream([script, failing]) as upstream,
        run_gateway(tmp_path, {"m": [provider(f"{upstream.base_url}/v1")]}) as gateway,
        await gateway.connect() as wire,
    ):
        wire.send(gateway.chat_request(STREAM))
        head = await wire.read_head()
        assert head.headers["content-type"].startswith("text/event-stream")
        assert await wire.read_chunk() == b": keep-alive\n\n"
        assert await wire.read_chunk() == b": keep-alive\n\n"
        ready.set()
        while piece := await wire.read_chunk():
            head.pieces.append(piece)
        assert text_of(head) == "Hello"

        ready.clear()
        wire.send(gateway.chat_request(STREAM))
        head = await wire.read_head()
        await wire.read_chunk()
        ready.set()
        while piece := await wire.read_chunk():
            head.pieces.append(piece)
        assert json.loads(head.events[-1])["error"]["message"] == "bad"
        assert (await wire.ask(request("GET", "/livez"))).status == 200


async def test_a_client_that_reads_nothing_stops_the_upstream_and_is_cut_off(tmp_path: Path) -> None:
    flood = Send(chunk(event({"content": "x" * 60_000})), times=4000)
    async with (
        ScriptedUpstream([[*event_stream([ROLE, HEL], end=False), flood]]) as upstream,
        run_gateway(tmp_path, {"m": [provider(f"{upstream.base_url}/v1")]}, stall_timeout_s=0.3) as gateway,
        await gateway.connect() as wire,
    ):
        wire.writer.transport.pause_reading()
        wire.send(gateway.chat_request(STREAM))
        await upstream.arrival(1)
        async with asyncio.timeout(LIMIT_S):
            await upstream.connections[0].lost.wait()
        async with asyncio.timeout(LIMIT_S):
            while gateway.app.in_flight:
                await asyncio.sleep(0)


async def test_a_slow_client_gets_everything(tmp_path: Path) -> None:
    flood = Send(chunk(event({"content": "x" * 60_000})), times=300)
    script = [*event_stream([ROLE, HEL], end=False), flood, Send(chunk(STOP + DONE)), Send(LAST_CHUNK)]
    async with (
        ScriptedUpstream([script]) as upstream,
        run_gateway(tmp_path, {"m": [provider(f"{upstream.base_url}/v1")]}) as gateway,
        await gateway.connect() as wire,
    ):
        wire.writer.transport.pause_reading()
        wire.send(gateway.chat_request(STREAM))
        await upstream.arrival(1)
        wire.writer.transport.resume_reading()
        got = await wire.read()
        assert len(text_of(got)) == 300 * 60_000 + 3


async def test_draining_refuses_new_requests_and_finishes_running_ones(tmp_path: Path) -> None:
    ready = asyncio.Event()
    script = [*event_stream([ROLE, HEL], end=False), Wait(ready), Send(chunk(LO + STOP + DONE)), Send(LAST_CHUNK)]
    async with (
        ScriptedUpstream([script]) as upstream,
        run_gateway(tmp_path, {"m": [provider(f"{upstream.base_url}/v1")]}) as gateway,
        await gateway.connect() as running,
        await gateway.connect() as idle,
    ):
        assert (await idle.ask(request("GET", "/livez"))).status == 200
        running.send(gateway.chat_request(STREAM))
        got = await running.read_head()
        draining = asyncio.create_task(gateway.server.drain())
        while not gateway.app.draining:
            await asyncio.sleep(0)
        refused = await idle.ask(gateway.chat_request(HELLO))
        assert refused.status == 503
        assert refused.error["code"] == "shutting_down"
        assert int(refused.headers["retry-after"]) >= 1
        fresh = await gateway.chat(HELLO)
        assert fresh.status == 503
        ready.set()
        while piece := await running.read_chunk():
            got.pieces.append(piece)
        assert text_of(got) == "Hello"
        await draining
        assert await running.closed() == b""


async def test_draining_is_bounded(tmp_path: Path) -> None:
    never = asyncio.Event()
    async with (
        ScriptedUpstream([[*event_stream([ROLE, HEL], end=False), Wait(never)]]) as upstream,
        run_gateway(tmp_path, {"m": [provider(f"{upstream.base_url}/v1")]}, drain_timeout_s=0.1) as gateway,
        await gateway.connect() as running,
    ):
        running.send(gateway.chat_request(STREAM))
        await running.read_head()
        async with asyncio.timeout(LIMIT_S):
            await gateway.server.drain()
        rest = await running.closed()
        assert b'"code":"shutting_down"' in rest
        assert b"[DONE]" not in rest
        assert gateway.app.in_flight == 0


async def test_an_unexpected_exception_is_a_500_that_tells_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def explode(*_: object) -> None:
        raise RuntimeError("the secret of line 42")

    async with run_gateway(tmp_path, {"m": [provider("http://127.0.0.1:9/v1")]}) as gateway:
        monkeypatch.setattr("helixflow.engines.openai.OpenAIEngine.open", explode)
        for body in (HELLO, STREAM):
            got = await gateway.chat(body, {"x-request-id": "mine"})
            assert got.status == 500
            assert got.error["code"] == "internal_error"
            assert "mine" in got.error["message"]
            assert got.headers["x-request-id"] == "mine"
            assert b"secret" not in got.body


async def test_cors_is_off_by_default_and_answers_allowed_origins(tmp_path: Path) -> None:
    here = {"origin": "https://here.example"}
    preflight = {**here, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    models = {"m": [provider("http://127.0.0.1:9/v1")]}
    async with run_gateway(tmp_path, models) as gateway:
        got = await gateway.ask("GET", "/v1/models", headers=here)
        assert "access-control-allow-origin" not in got.headers
        assert (await gateway.ask("OPTIONS", "/v1/chat/completions", headers=preflight)).status == 405
    origins = {"origins": ["https://here.example"]}
    async with run_gateway(tmp_path, models, cors=origins) as gateway, await gateway.connect() as wire:
        got = await wire.ask(request("OPTIONS", "/v1/chat/completions", headers=preflight))
        assert got.status == 204
        assert got.headers["access-control-allow-origin"] == "https://here.example"
        assert "POST" in got.headers["access-control-allow-methods"]
        assert got.headers["access-control-allow-headers"] == "authorization"
        got = await wire.ask(request("GET", "/v1/models", key=gateway.key, headers=here))
        assert got.headers["access-control-allow-origin"] == "https://here.example"
        got = await wire.ask(request("POST", "/v1/chat/completions", b"{}", headers=here))
        assert got.status == 401
        assert got.headers["access-control-allow-origin"] == "https://here.example"
        got = await wire.ask(request("GET", "/livez", headers={"origin": "https://evil.example"}))
        assert "access-control-allow-origin" not in got.headers


async def test_metrics_count_requests_with_bounded_labels(tmp_path: Path) -> None:
    async with (
        ScriptedUpstream([GOOD, [WHOLE]]) as upstream,
        run_gateway(tmp_path, {"m": [provider(f"{upstream.base_url}/v1", model="their-m")]}) as gateway,
    ):
        await gateway.chat(STREAM)
        await gateway.chat(HELLO)
        before = (await gateway.ask("GET", "/metrics")).body.decode()
        for n in range(20):
            await gateway.ask("GET", f"/random/{n}")
            await gateway.chat(HELLO.replace(b'"m"', b'"random-%d"' % n), {"x-request-id": f"random-{n}"})
        got = await gateway.ask("GET", "/metrics")
        after = got.body.decode()
    assert got.headers["content-type"].startswith("text/plain; version=0.0.4")
    labels = {"deployment": "m/openai-0", "operation": "chat/completions", "status": "200"}
    assert figure(before, "helixflow_requests_total", labels) == 2
    assert figure(before, "helixflow_tokens_total", {**labels, "direction": "in"}) == 14
    assert figure(before, "helixflow_tokens_total", {**labels, "direction": "out"}) == 4
    assert figure(before, "helixflow_first_token_seconds_count", labels) == 1  # known of streams only
    assert "helixflow_requests_in_flight 1.0" in before
    assert "random" not in after
