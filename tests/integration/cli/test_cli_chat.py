"""`helixflow chat` and the welcome against a scripted server."""

import asyncio
import json
import os
import pty
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helixflow.cli import welcome
from helixflow.transport.testing import ScriptedUpstream, Send, Wait, answer, chunk, event_stream

MODELS = answer(json.dumps({"object": "list", "data": [{"id": "all-minilm-l6-v2"}, {"id": "tiny"}]}).encode())
COMMAND = (sys.executable, "-m", "helixflow.cli.main")


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def spoken(*words: str, usage: int | None = None) -> list[bytes]:
    events = [event(model="tiny", choices=[{"index": 0, "delta": {"role": "assistant", "content": None}}])]
    events += [event(model="tiny", choices=[{"index": 0, "delta": {"content": word}}]) for word in words]
    events.append(event(model="tiny", choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}]))
    if usage is not None:
        events.append(event(model="tiny", choices=[], usage={"prompt_tokens": 5, "completion_tokens": usage}))
    return [*events, b"data: [DONE]\n\n"]


def refusal(status: str, message: str, code: str) -> Send:
    return answer(json.dumps({"error": {"message": message, "code": code}}).encode(), status=status)


async def test_one_question_with_the_first_chat_model(run: Callable[..., Any]) -> None:
    async with ScriptedUpstream([[MODELS], event_stream(spoken("Par", "is."))]) as upstream:
        words = ("chat", "Capital?", "--system", "Be brief.", "--temperature", "0", "--max-tokens", "9")
        outcome = await asyncio.to_thread(run, *words, "--base-url", f"{upstream.base_url}/v1", "--api-key", "sk-1")
    assert (outcome.code, outcome.out, outcome.err) == (0, "Paris.\n", "")
    listing, question = upstream.requests
    assert (listing.method, listing.target) == ("GET", "/v1/models")
    assert question.headers["authorization"] == "Bearer sk-1"
    sent = json.loads(question.body)
    assert sent == {
        "model": "tiny",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Capital?"}],
        "temperature": 0.0,
        "max_tokens": 9,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def test_json_has_the_answer_and_its_figures(run: Callable[..., Any]) -> None:
    async with ScriptedUpstream([event_stream(spoken("Par", "is.", usage=7))]) as upstream:
        outcome = await asyncio.to_thread(
            run, "chat", "Capital?", "--json", "--model", "tiny", "--base-url", upstream.base_url
        )
    found = json.loads(outcome.out)
    assert (found["content"], found["completion_tokens"], found["prompt_tokens"]) == ("Paris.", 7, 5)
    assert found["finish_reason"] == "stop"
    assert found["time_to_first_token_s"] >= 0


async def test_without_streaming(run: Callable[..., Any]) -> None:
    whole = {"model": "tiny", "choices": [{"message": {"content": "Paris."}, "finish_reason": "stop"}]}
    async with ScriptedUpstream([[answer(json.dumps(whole).encode())]]) as upstream:
        outcome = await asyncio.to_thread(
            run, "chat", "Capital?", "--no-stream", "--model", "tiny", "--base-url", upstream.base_url
        )
    assert outcome.out == "Paris.\n"
    assert "stream" not in json.loads(upstream.requests[0].body)


@pytest.mark.parametrize(
    ("script", "code", "line"),
    [
        ([refusal("401 Unauthorized", "Wrong key.", "invalid_api_key")], 1, "Wrong key."),
        ([refusal("404 Not Found", "No such model.", "model_not_found")], 5, "No such model."),
        ([refusal("503 Service Unavailable", "Still loading.", "model_loading")], 6, "Still loading."),
        ([answer(b"<html>", status="502 Bad Gateway")], 6, "answered with status 502"),
        ([answer(b"<html>hello")], 1, "does not answer as an OpenAI-compatible server does"),
        ([Send(b"SSH-2.0-OpenSSH\r\n")], 1, "not valid HTTP"),
        (event_stream([event(error={"message": "The engine\ncrashed."})]), 6, "The engine"),
    ],
    ids=["key", "model", "loading", "html error", "html", "ssh", "event"],
)
async def test_what_a_server_refuses_is_clear(run: Callable[..., Any], script: Any, code: int, line: str) -> None:
    async with ScriptedUpstream([script]) as upstream:
        outcome = await asyncio.to_thread(run, "chat", "Hi", "--model", "m", "--base-url", upstream.base_url)
    assert outcome.code == code
    assert line in outcome.err
    assert all(text.startswith("helixflow: ") for text in outcome.err.splitlines())


async def test_no_server_there(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    async with ScriptedUpstream([]) as upstream:
        port = upstream.port
    outcome = await asyncio.to_thread(run, "chat", "Hi", "--base-url", f"http://127.0.0.1:{port}")
    assert outcome.code == 6
    assert outcome.err == f"helixflow: nothing answers at http://127.0.0.1:{port}/v1 (Connection refused)\n"
    monkeypatch.setenv("HELIXFLOW_GATEWAY__HTTP_PORT", str(port))
    assert "start the service with: helixflow serve" in (await asyncio.to_thread(run, "chat", "Hi")).err


async def test_the_first_key_goes_only_to_helixflow(run: Callable[..., Any], data_dir: Path) -> None:
    data_dir.mkdir()
    (data_dir / "bootstrap.key").write_text("hfk_first\n")
    for name, sent in (("helixflow", "Bearer hfk_first"), ("ollama", None)):
        version = answer(json.dumps({"name": name}).encode())
        async with ScriptedUpstream([[version], event_stream(spoken("Hi"))]) as upstream:
            outcome = await asyncio.to_thread(run, "chat", "Hi", "--model", "m", "--base-url", upstream.base_url)
        assert outcome.code == 0
        assert "authorization" not in upstream.requests[0].headers
        assert upstream.requests[1].headers.get("authorization") == sent


async def test_a_conversation_sends_its_history(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    saved = tmp_path / "talk.json"
    lines: Iterator[str] = iter(
        ["Hello", "And?", "/model other", "fails", f"/save {saved}", f"/save {saved}", "/reset", "Again", "/quit"]
    )
    monkeypatch.setattr("builtins.input", lambda _prompt: next(lines))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    scripts = [
        event_stream(spoken("Hi.")),
        event_stream(spoken("So.")),
        [refusal("500 Internal Server Error", "Broken.", "x")],
        event_stream(spoken("Yes.")),
    ]
    async with ScriptedUpstream(scripts) as upstream:
        outcome = await asyncio.to_thread(
            run, "chat", "--system", "S", "--model", "tiny", "--base-url", upstream.base_url, "--api-key", "k"
        )
    assert outcome.code == 0
    system = {"role": "system", "content": "S"}
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
    more = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "So."}]
    sent = [json.loads(request.body) for request in upstream.requests]
    assert sent[1]["messages"] == [system, *talk, {"role": "user", "content": "And?"}]
    assert sent[2]["model"] == "other"
    assert json.loads(saved.read_text())["messages"] == [system, *talk, *more]
    assert saved.stat().st_mode & 0o777 == 0o600
    assert sent[3]["messages"] == [system, {"role": "user", "content": "Again"}]
    assert outcome.err.splitlines() == ["helixflow: Broken.", f"helixflow: {saved} exists; choose another name"]


async def test_ctrl_c_ends_the_answer_and_its_connection(data_dir: Path) -> None:
    first = event(choices=[{"delta": {"content": "Once upon"}}])
    async with ScriptedUpstream([event_stream([first], end=False)]) as upstream:
        words = ("chat", "Hi", "--model", "m", "--base-url", upstream.base_url, "--api-key", "k")
        process = await asyncio.create_subprocess_exec(
            *COMMAND, *words, stdout=-1, stderr=-1, stdin=asyncio.subprocess.DEVNULL
        )
        assert process.stdout is not None
        async with asyncio.timeout(120):
            assert await process.stdout.readexactly(9) == b"Once upon"
            process.send_signal(signal.SIGINT)
            _, err = await process.communicate()
            await upstream.connections[0].lost.wait()
    assert process.returncode == 130
    assert b"Traceback" not in err


async def test_ctrl_c_in_a_conversation_returns_to_the_prompt(data_dir: Path) -> None:
    first = event(choices=[{"delta": {"content": "Once upon"}}])
    scripts = [event_stream([first], end=False), event_stream(spoken("Fine."))]
    async with ScriptedUpstream(scripts) as upstream:
        ours, theirs = pty.openpty()
        words = ("chat", "--model", "m", "--base-url", upstream.base_url, "--api-key", "k")
        process = await asyncio.create_subprocess_exec(*COMMAND, *words, stdout=-1, stderr=-1, stdin=theirs)
        os.close(theirs)
        assert process.stdout is not None
        async with asyncio.timeout(120):
            os.write(ours, b"Tell me a story\n")
            await process.stdout.readuntil(b"Once upon")
            process.send_signal(signal.SIGINT)
            await process.stdout.readuntil(b"(stopped)")
            await upstream.connections[0].lost.wait()
            os.write(ours, b"Thanks\n")
            await process.stdout.readuntil(b"Fine.")
            os.write(ours, b"/quit\n")
            _, err = await process.communicate()
        os.close(ours)
    assert (process.returncode, err) == (0, b"")
    assert [message["content"] for message in json.loads(upstream.requests[1].body)["messages"]] == [
        "Tell me a story",
        "Once upon",
        "Thanks",
    ]


async def test_a_reader_that_goes_away_is_no_traceback(data_dir: Path) -> None:
    first = event(choices=[{"delta": {"content": "word\n"}}])
    gone = asyncio.Event()
    script = [*event_stream([first], end=False), Wait(gone), Send(chunk(first * 20_000), times=3)]
    async with ScriptedUpstream([script]) as upstream:
        words = ("chat", "Hi", "--model", "m", "--base-url", upstream.base_url, "--api-key", "k")
        ours, theirs = os.pipe()
        process = await asyncio.create_subprocess_exec(
            *COMMAND, *words, stdout=theirs, stderr=-1, stdin=asyncio.subprocess.DEVNULL
        )
        os.close(theirs)
        async with asyncio.timeout(120):
            assert await asyncio.to_thread(os.read, ours, 5) == b"word\n"
            os.close(ours)
            gone.set()
            _, err = await process.communicate()
    assert (process.returncode, err) == (1, b"")


async def test_the_welcome_waits_asks_and_shows_how_to_connect(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = tmp_path / "key"
    key.write_text("hfk_k\n")
    scripts = [
        [answer(b"{}", status="503 Service Unavailable")],
        [answer(b"{}")],
        event_stream(spoken("The capital of France is Paris.")),
    ]
    async with ScriptedUpstream(scripts) as upstream:
        base_url = f"{upstream.base_url}/v1"
        argv = [
            "--https-url",
            "https://127.0.0.1:1/v1",
            "--base-url",
            base_url,
            "--key-file",
            str(key),
            "--chat-model",
            "tiny",
        ]
        assert await asyncio.to_thread(welcome.main, argv) == 0
    out = capsys.readouterr().out
    assert "Answer: The capital of France is Paris.\nTime to first token " in out
    assert f"curl {base_url}/chat/completions -H 'Authorization: Bearer hfk_k'" in out
    sent = json.loads(upstream.requests[2].body)
    assert sent["messages"][0] == {"role": "system", "content": "You are a helpful assistant."}
    assert sent["temperature"] == 0


async def test_a_welcome_that_fails_says_so_and_still_shows_how_to_connect(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = tmp_path / "key"
    key.write_text("hfk_k\n")
    scripts = [[answer(b"{}")], [refusal("502 Bad Gateway", "The engine is down.", "x")]]
    async with ScriptedUpstream(scripts) as upstream:
        argv = [
            "--https-url",
            "https://127.0.0.1:1/v1",
            "--base-url",
            f"{upstream.base_url}/v1",
            "--key-file",
            str(key),
            "--chat-model",
            "tiny",
        ]
        assert await asyncio.to_thread(welcome.main, argv) == 1
    captured = capsys.readouterr()
    expected = "helixflow: the welcome question failed: The engine is down. The service keeps running.\n"
    assert captured.err == expected
    assert "API key   hfk_k" in captured.out
