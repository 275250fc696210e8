"""Several replicas of one deployment behind the gateway: the next one is tried while the client has seen nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from helixflow.core.capacity import Replica
from helixflow.settings.tree import LogSettings
from helixflow.transport.testing import Reset, ScriptedUpstream, Step, event_stream
from tests.harness.gateway import local, run_gateway

PLAIN = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


def event(delta: dict[str, Any], finish: str | None = None) -> bytes:
    choice = {"finish_reason": finish, "index": 0, "delta": delta}
    body = {"choices": [choice], "created": 1, "id": "chatcmpl-x", "model": "m", "system_fingerprint": "b"}
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def engine_answer(text: str) -> list[Step]:
    return event_stream([event({"content": text}), event({}, "stop"), b"data: [DONE]\n\n"])


def replica(name: str, port: int, *, slots: int = 1, vocabulary: int = 0) -> Replica:
    return Replica(name, "127.0.0.1", port, "k", slots, 512, vocabulary=vocabulary)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_replica_that_fails_before_its_first_word_is_replaced(tmp_path: Path, stream: bool) -> None:
    async with (
        ScriptedUpstream([[Reset()]]) as bad,
        ScriptedUpstream([engine_answer("from the good one")]) as good,
        run_gateway(tmp_path, {"m": [local()]}) as gateway,
    ):
        # The one with more slots is less loaded, and so comes first.
        replicas = (replica("bad", bad.origin.port, slots=2), replica("good", good.origin.port))
        gateway.show("m/llama_cpp-0", "ready", *replicas)
        answer = await gateway.chat(json.dumps({**PLAIN, "stream": stream}).encode())
        assert answer.status == 200
        assert b"from the good one" in answer.body
        assert [len(bad.requests), len(good.requests)] == [1, 1]


async def test_with_one_replica_its_failure_is_told_at_once(tmp_path: Path) -> None:
    async with ScriptedUpstream([[Reset()]]) as bad, run_gateway(tmp_path, {"m": [local()]}) as gateway:
        gateway.show("m/llama_cpp-0", "ready", replica("bad", bad.origin.port))
        answer = await gateway.chat(json.dumps(PLAIN).encode())
        assert answer.status == 502
        assert json.loads(answer.body)["error"]["code"] == "upstream_unavailable"
        assert len(bad.requests) == 1


async def test_one_call_with_many_choices_does_not_need_a_queue_of_its_own(tmp_path: Path) -> None:
    scripts = [engine_answer(f"answer {n}") for n in range(5)]
    async with ScriptedUpstream(scripts) as engine, run_gateway(tmp_path, {"m": [local(max_queue=0)]}) as gateway:
        gateway.show("m/llama_cpp-0", "ready", replica("r", engine.origin.port))
        answer = await gateway.chat(json.dumps({**PLAIN, "n": 5}).encode())
        assert answer.status == 200
        choices = json.loads(answer.body)["choices"]
        assert [choice["index"] for choice in choices] == [0, 1, 2, 3, 4]
        assert len({choice["message"]["content"] for choice in choices}) == 5


async def test_fields_that_steer_the_engine_stay_here(tmp_path: Path) -> None:
    async with ScriptedUpstream([engine_answer("x")]) as engine, run_gateway(tmp_path, {"m": [local()]}) as gateway:
        gateway.show("m/llama_cpp-0", "ready", replica("r", engine.origin.port))
        body = {**PLAIN, "n_cmpl": 3, "n_probs": 40_000, "id_slot": 1, "lora": [], "min_p": 0.1}
        assert (await gateway.chat(json.dumps(body).encode())).status == 200
        sent = json.loads(engine.requests[0].body)
        assert sent["min_p"] == 0.1
        assert not {"n_cmpl", "n_probs", "id_slot", "lora"} & sent.keys()


async def test_a_full_cache_is_told_as_overload_and_not_held_against_the_replica(tmp_path: Path) -> None:
    full = b'data: {"error":{"code":500,"message":"Context size has been exceeded.","type":"server_error"}}\n\n'
    scripts = [event_stream([full]), engine_answer("later")]
    async with ScriptedUpstream(scripts) as engine, run_gateway(tmp_path, {"m": [local()]}) as gateway:
        gateway.show("m/llama_cpp-0", "ready", replica("r", engine.origin.port))
        answer = await gateway.chat(json.dumps(PLAIN).encode())
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == (503, "overloaded")
        assert (await gateway.chat(json.dumps(PLAIN).encode())).status == 200


async def test_an_answer_that_breaks_off_is_recorded_with_its_prompt(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    progress = json.loads(event({"role": "assistant", "content": None}).removeprefix(b"data: "))
    progress["prompt_progress"] = {"total": 27, "cache": 0, "processed": 0, "time_ms": 0}
    first = b"data: " + json.dumps(progress, separators=(",", ":")).encode() + b"\n\n"
    broken = [*event_stream([first, event({"content": "Half"})], end=False), Reset()]
    log = LogSettings(level="info", format="json")
    async with ScriptedUpstream([broken]) as engine, run_gateway(tmp_path, {"m": [local()]}, log=log) as gateway:
        gateway.show("m/llama_cpp-0", "ready", replica("r", engine.origin.port))
        answer = await gateway.chat(json.dumps({**PLAIN, "stream": True}).encode())
        assert b"Half" in answer.body
        assert b"upstream_unavailable" in answer.body
        assert b"[DONE]" not in answer.body
    line = next(line for line in capfd.readouterr().err.splitlines() if '"chat/completions"' in line)
    assert (json.loads(line)["prompt_tokens"], json.loads(line)["completion_tokens"]) == (27, 1)


@pytest.mark.parametrize("token", ["100", "9" * 5000])
async def test_a_bias_on_what_is_no_token_of_the_model_is_refused(tmp_path: Path, token: str) -> None:
    async with ScriptedUpstream([]) as engine, run_gateway(tmp_path, {"m": [local()]}) as gateway:
        gateway.show("m/llama_cpp-0", "ready", replica("r", engine.origin.port, vocabulary=100))
        answer = await gateway.chat(json.dumps({**PLAIN, "logit_bias": {token: 1}}).encode())
        assert answer.status == 400
        error = json.loads(answer.body)["error"]
        assert (error["param"], error["code"]) == ("logit_bias", "invalid_value")
        assert "end at 99" in error["message"]
        assert engine.requests == []
