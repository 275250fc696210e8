"""Servers that answer rubbish, stall, or never end: a clear error, one line for the operator, nothing left open."""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pytest
from structlog.testing import capture_logs

from helixflow.core.call import Call, Completer, Operation
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.engines.anthropic import AnthropicEngine
from helixflow.engines.ollama import OllamaEngine
from helixflow.engines.openai import OpenAIEngine
from helixflow.transport.client import HttpClient, PoolStats, Timeouts
from helixflow.transport.testing import LAST_CHUNK, Close, Reset, ScriptedUpstream, Send, Step, Wait, answer, chunk
from tests.harness.engine_kinds import make_call, provider_options

# For servers that say nothing more; the others are not to be cut off because the machine has other work.
IMPATIENT = Timeouts(connect_s=60, first_byte_s=0.3, idle_s=0.3)
PATIENT = Timeouts(connect_s=60, first_byte_s=60, idle_s=60)
FREED_S = 20.0
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
JSON = "application/json"
INVALID = ErrorKind.UPSTREAM_INVALID


@dataclass(frozen=True, slots=True)
class Dialect:
    """One provider's: an answer is `begin`, `word`, any number of times, and `end`; `error` comes with status 200."""

    make: Callable[..., Completer]
    media_type: str
    begin: bytes
    word: bytes
    end: bytes
    error: bytes
    absurd: bytes
    extra: Mapping[str, Any]

    def engine(self, client: HttpClient, base_url: str, timeouts: Timeouts = PATIENT) -> Completer:
        return self.make(client, **{**provider_options(base_url), "timeouts": timeouts}, **self.extra)


def _sse(*events: Any) -> bytes:
    return b"".join(b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n" for event in events)


def _openai_chunk(delta: dict[str, str], reason: str | None = None, **fields: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "up", "choices": [choice], **fields}


def _openai_end(prompt: int, completion: int) -> bytes:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return _sse(_openai_chunk({}, "stop"), _openai_chunk({}) | {"choices": [], "usage": usage}) + b"data: [DONE]\n\n"


def _anthropic_end(completion: int) -> bytes:
    delta = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": completion}}
    return _sse(delta, {"type": "message_stop"})


def _ollama(text: str, **fields: Any) -> bytes:
    return json.dumps({"message": {"role": "assistant", "content": text}, "done": False, **fields}).encode() + b"\n"


DIALECTS: Final = {
    "openai": Dialect(
        OpenAIEngine,
        "text/event-stream",
        _sse(_openai_chunk({"role": "assistant"})),
        _sse(_openai_chunk({"content": "Hi"})),
        _openai_end(5, 2),
        _sse({"error": {"message": "boom", "code": 500}}),
        _openai_end(10**12, -7),
        {},
    ),
    "anthropic": Dialect(
        AnthropicEngine,
        "text/event-stream",
        _sse(
            {"type": "message_start", "message": {"usage": {"input_tokens": 5, "output_tokens": 1}}}, {"type": "ping"}
        ),
        _sse({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hi"}}),
        _anthropic_end(2),
        _sse({"type": "error", "error": {"type": "api_error", "message": "boom"}}),
        _anthropic_end(10**12),
        {"version": "2023-06-01", "max_tokens": 64},
    ),
    "ollama": Dialect(
        OllamaEngine,
        "application/x-ndjson",
        b"",
        _ollama("Hi"),
        _ollama("", done=True, done_reason="stop", prompt_eval_count=5, eval_count=2),
        b'{"error":"boom"}\n',
        _ollama("", done=True, done_reason="stop", prompt_eval_count=10**12, eval_count=-3),
        {"context": 512},
    ),
}


@pytest.fixture(params=DIALECTS)
def dialect(request: pytest.FixtureRequest) -> Dialect:
    return DIALECTS[request.param]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one call: the error, the bytes before it, and what was left behind."""

    error: HelixError | None
    body: bytes
    call: Call
    lines: Sequence[Mapping[str, Any]]
    stats: PoolStats


async def run(
    dialect: Dialect,
    steps: Sequence[Step],
    *,
    streamed: bool = True,
    gate: asyncio.Event | None = None,
    timeouts: Timeouts = PATIENT,
) -> Outcome:
    """One call. `gate` opens once its first word is at hand."""
    call = make_call(Operation.CHAT, {**HELLO, "stream": streamed})
    error: HelixError | None = None
    body = b""
    client = HttpClient()
    async with ScriptedUpstream([steps]) as upstream:
        try:
            with capture_logs() as lines:
                try:
                    stream = await dialect.engine(client, upstream.base_url, timeouts).open(call)
                    if gate is not None:
                        gate.set()
                    try:
                        while piece := await stream.read():
                            body += piece
                    finally:
                        stream.close()
                except HelixError as exc:
                    error = exc
            stats = client.stats()
            if stats.open == 0:
                await asyncio.wait_for(upstream.connections[0].lost.wait(), FREED_S)
        finally:
            await client.close()
    return Outcome(error, body, call, [line for line in lines if line["event"] == "provider.failed"], stats)


def timeouts_for(name: str) -> Timeouts:
    return IMPATIENT if "silence" in name else PATIENT


def check_failed(outcome: Outcome, kind: ErrorKind = INVALID) -> None:
    assert outcome.error is not None
    assert outcome.error.kind is kind
    assert "127.0.0.1" not in outcome.error.message
    (line,) = outcome.lines
    assert (line["log_level"], line["code"]) == ("warning", outcome.error.code)
    assert line["reason"] == outcome.error.message
    assert outcome.stats.open == outcome.stats.idle, "nothing is left under way"
    assert not outcome.call.progress.complete


def head(media_type: str, *more: str) -> Send:
    lines = "".join(f"{line}\r\n" for line in (f"content-type: {media_type}", "transfer-encoding: chunked", *more))
    return Send(f"HTTP/1.1 200 OK\r\n{lines}\r\n".encode())


def body_of(dialect: Dialect, *pieces: bytes | asyncio.Event, end: bool = True) -> list[Step]:
    """The pieces as an answer in the dialect's form, with waits between them."""
    sent = [piece for piece in (dialect.begin, *pieces) if piece]
    steps = [Wait(piece) if isinstance(piece, asyncio.Event) else Send(chunk(piece)) for piece in sent]
    return [head(dialect.media_type), *steps, *([Send(LAST_CHUNK)] if end else [])]


Script = Callable[[Dialect], Sequence[Step]]
# Before the first word, so for streams and for whole answers alike.
AT_ONCE: Final[Mapping[str, tuple[Script, ErrorKind]]] = {
    "no HTTP": (lambda _: [Send(b"\x00\x01 rubbish\r\n\r\n"), Close()], INVALID),
    "hangs up": (lambda _: [Reset()], ErrorKind.UPSTREAM_UNAVAILABLE),
    "an endless head": (
        lambda _: [Send(b"HTTP/1.1 200 OK\r\n"), Send(b"x-more: and more\r\n", times=50_000), Wait(asyncio.Event())],
        INVALID,
    ),
    "rubbish": (lambda d: [answer(b"\x8f\xff\n\n\n", headers=[("content-type", d.media_type)])], INVALID),
    "nothing": (lambda d: [answer(b"", headers=[("content-type", d.media_type)])], INVALID),
    "half a JSON": (lambda _: [answer(b'{"choices":[{"mess', headers=[("content-type", JSON)])], INVALID),
    "another JSON": (lambda _: [answer(b'{"hello":"world"}\n', headers=[("content-type", JSON)])], INVALID),
    "a web page": (
        lambda _: [answer(b"<html>Welcome</html>", headers=[("content-type", "text/html; charset=utf-8")])],
        INVALID,
    ),
    "a web page that says it is none": (
        lambda d: [answer(b"<html>Welcome</html>\n\n", headers=[("content-type", d.media_type)])],
        INVALID,
    ),
    "an error with status 200": (
        lambda _: [answer(b'{"error":{"message":"boom"}}\n', headers=[("content-type", JSON)])],
        ErrorKind.UPSTREAM_UNAVAILABLE,
    ),
    "gzip": (
        lambda d: [answer(b"\x1f\x8b", headers=[("content-type", d.media_type), ("content-encoding", "gzip")])],
        INVALID,
    ),
    "never a line": (
        lambda d: [head(d.media_type), Send(chunk(b"x" * 2**20), times=80), Wait(asyncio.Event())],
        INVALID,
    ),
    "silence before the head": (lambda _: [Wait(asyncio.Event())], ErrorKind.DEADLINE),
    "silence after it": (lambda d: [head(d.media_type), Wait(asyncio.Event())], ErrorKind.DEADLINE),
    "silence within a refusal": (
        lambda _: [Send(b"HTTP/1.1 500 Oops\r\ncontent-length: 5\r\n\r\n"), Wait(asyncio.Event())],
        ErrorKind.DEADLINE,
    ),
    "a refusal that never ends": (
        lambda _: [
            Send(b"HTTP/1.1 500 Oops\r\ntransfer-encoding: chunked\r\n\r\n"),
            Send(chunk(b"x" * 65_536), times=64),
            Wait(asyncio.Event()),
        ],
        ErrorKind.UPSTREAM_UNAVAILABLE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", AT_ONCE)
async def test_before_the_first_word(dialect: Dialect, name: str, streamed: bool) -> None:
    script, kind = AT_ONCE[name]
    outcome = await run(dialect, script(dialect), streamed=streamed, timeouts=timeouts_for(name))
    check_failed(outcome, kind)
    assert outcome.body == b""
    assert outcome.call.progress.first_content_at is None


Later = Callable[[Dialect, asyncio.Event], Sequence[Step]]
# The gate opens when the first word has been read.
LATER: Final[Mapping[str, tuple[Later, ErrorKind]]] = {
    "hangs up": (lambda d, gate: [*body_of(d, d.word, gate, end=False), Reset()], INVALID),
    "ends without its end": (lambda d, gate: body_of(d, d.word, gate), INVALID),
    "half an event": (lambda d, gate: body_of(d, d.word, gate, d.word[:20]), INVALID),
    "silence": (lambda d, gate: [*body_of(d, d.word, end=False), Wait(asyncio.Event())], ErrorKind.DEADLINE),
    "an error": (lambda d, gate: body_of(d, d.word, gate, d.error), ErrorKind.UPSTREAM_UNAVAILABLE),
    "an error in the same piece": (
        lambda d, gate: body_of(d, d.word, gate, d.word + d.error),
        ErrorKind.UPSTREAM_UNAVAILABLE,
    ),
    "rubbish": (lambda d, gate: body_of(d, d.word, gate, b'data: {"choices":\n\n'), INVALID),
    "no text": (lambda d, gate: body_of(d, d.word, gate, d.word.replace(b"Hi", b"H\xff")), INVALID),
    "NUL": (lambda d, gate: body_of(d, d.word, gate, d.word.replace(b"Hi", b"H\0")), INVALID),
    "no text in the same piece": (
        lambda d, gate: body_of(d, d.word, gate, d.word * 3 + d.word.replace(b"Hi", b"H\xff") + d.end),
        INVALID,
    ),
    "an event without end": (
        lambda d, gate: [
            *body_of(d, d.word, gate, d.word.rstrip(b"\n}"), end=False),
            Send(chunk(b" " * 2**20), times=20),
            Close(),
        ],
        INVALID,
    ),
}


@pytest.mark.parametrize("name", LATER)
async def test_after_it(dialect: Dialect, name: str) -> None:
    script, kind = LATER[name]
    gate = asyncio.Event()
    outcome = await run(dialect, script(dialect, gate), gate=gate, timeouts=timeouts_for(name))
    check_failed(outcome, kind)
    assert outcome.call.progress.first_content_at is not None
    assert outcome.body.count(b'"Hi"') == {"no text in the same piece": 4, "an error in the same piece": 2}.get(name, 1)
    assert b"[DONE]" not in outcome.body
    assert b"\xff" not in outcome.body
    assert b"\0" not in outcome.body


async def test_an_escaped_nul_is_text(dialect: Dialect) -> None:
    outcome = await run(dialect, body_of(dialect, dialect.word.replace(b"Hi", b"H\\u0000"), dialect.end))
    assert outcome.error is None
    assert b"H\\u0000" in outcome.body


@pytest.mark.parametrize("after", ["the end again", "more words", "rubbish", "no end", "words without end"])
async def test_what_comes_after_the_end_is_not_read(dialect: Dialect, after: str) -> None:
    more: dict[str, list[Step]] = {
        "the end again": [Send(chunk(dialect.end)), Send(LAST_CHUNK)],
        "more words": [Send(chunk(dialect.word)), Send(LAST_CHUNK)],
        "rubbish": [Send(chunk(b"\xff" * 500)), Send(LAST_CHUNK)],
        "no end": [Wait(asyncio.Event())],
        "words without end": [Send(chunk(dialect.word), times=100_000), Wait(asyncio.Event())],
    }
    steps = [*body_of(dialect, dialect.word, dialect.end, end=False), *more[after]]
    outcome = await run(dialect, steps)
    assert outcome.error is None
    assert outcome.lines == []
    assert outcome.body.count(b"[DONE]") == 1
    assert outcome.body.count(b'"Hi"') == 1
    assert outcome.body.endswith(b"data: [DONE]\n\n")
    assert outcome.call.progress.complete
    assert outcome.stats.open == outcome.stats.idle
    usage = outcome.call.progress.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.reported) == (5, 2, True)


async def test_usage_that_cannot_be_is_not_believed(dialect: Dialect) -> None:
    outcome = await run(dialect, body_of(dialect, dialect.word, dialect.absurd))
    assert outcome.error is None
    usage = outcome.call.progress.usage
    assert not usage.reported
    assert 0 < usage.prompt_tokens < 100
    assert usage.completion_tokens == 1


@pytest.mark.parametrize("streamed", [False, True])
async def test_events_that_never_say_anything_have_a_bound(streamed: bool) -> None:
    role = _sse(_openai_chunk({"role": "assistant"}, padding="x" * 8000))
    steps: list[Step] = [head("text/event-stream"), Send(chunk(role), times=10_000), Wait(asyncio.Event())]
    check_failed(await run(DIALECTS["openai"], steps, streamed=streamed))


async def test_a_whole_answer_that_never_ends_has_a_bound(dialect: Dialect) -> None:
    word = dialect.word.replace(b"Hi", b"x" * 2**20)
    steps: list[Step] = [head(dialect.media_type), Send(chunk(word), times=80), Wait(asyncio.Event())]
    check_failed(await run(dialect, steps, streamed=False))


async def test_a_client_that_leaves_takes_the_connection_with_it(dialect: Dialect) -> None:
    client = HttpClient()
    async with ScriptedUpstream([[*body_of(dialect, dialect.word, end=False), Wait(asyncio.Event())]] * 2) as upstream:
        engine = dialect.engine(client, upstream.base_url)
        stream = await engine.open(make_call(Operation.CHAT, {**HELLO, "stream": True}))
        stream.close()
        await asyncio.wait_for(upstream.connections[0].lost.wait(), FREED_S)
        opening = asyncio.create_task(engine.open(make_call(Operation.CHAT, HELLO)))
        await upstream.arrival(2)
        opening.cancel()
        await asyncio.wait_for(upstream.connections[1].lost.wait(), FREED_S)
    await client.close()


_REFUSED: Final = {
    "openai": _sse(_openai_chunk({}, "content_filter")) + b"data: [DONE]\n\n",
    "anthropic": _sse({"type": "message_delta", "delta": {"stop_reason": "refusal"}, "usage": {"output_tokens": 0}})
    + _sse({"type": "message_stop"}),
}
_REFUSED_WHOLE: Final = {
    "model": "up",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": None}, "finish_reason": "content_filter"}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 0, "total_tokens": 5},
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", _REFUSED)
async def test_nothing_but_the_word_of_a_filter_is_an_error_that_another_model_may_mend(
    name: str, streamed: bool
) -> None:
    dialect = DIALECTS[name]
    steps: Sequence[Step] = body_of(dialect, _REFUSED[name])
    if name == "openai" and not streamed:
        steps = [answer(json.dumps(_REFUSED_WHOLE).encode(), headers=[("content-type", JSON)])]
    outcome = await run(dialect, steps, streamed=streamed)
    assert outcome.error is not None
    assert outcome.error.kind is ErrorKind.CONTENT_FILTERED
    assert (outcome.body, outcome.lines) == (b"", []), "it is no fault of the server"
    assert outcome.stats.open == outcome.stats.idle


@pytest.mark.parametrize("name", _REFUSED)
async def test_a_filter_that_comes_later_ends_the_answer(name: str) -> None:
    dialect = DIALECTS[name]
    outcome = await run(dialect, body_of(dialect, dialect.word, _REFUSED[name]))
    assert outcome.error is None
    assert outcome.call.progress.complete
    assert outcome.call.progress.finish_reason == "content_filter"
    assert b'"content":"Hi"' in outcome.body
