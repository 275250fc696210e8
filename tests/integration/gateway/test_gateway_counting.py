"""Servers that do not say what they used: counted by their tokenizer, or by length."""

import json
from collections.abc import Sequence
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from helixflow.transport.testing import ScriptedUpstream, Step, answer, event_stream
from tests.harness.gateway import provider, run_gateway

PROMPT = "How are you today?"
ASKED = b'{"model":"m","messages":[{"role":"user","content":"%b"}]}' % PROMPT.encode()
STREAMED = ASKED[:-1] + b',"stream":true}'
REPLY = "Fine, thank you."
SILENT = answer(
    b'{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"message":'
    b'{"role":"assistant","content":"%b"},"finish_reason":"stop"}]}' % REPLY.encode(),
    headers=[("content-type", "application/json")],
)
NO_TOKENIZER = answer(b"{}", status="404 Not Found")


def event(delta: dict[str, str], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    fields = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return b"data: " + json.dumps(fields, separators=(",", ":")).encode() + b"\n\n"


SILENT_STREAM = event_stream(
    [
        event({"role": "assistant"}),
        event({"content": "Fi"}),
        event({"content": "ne"}),
        event({}, "stop"),
        b"data: [DONE]\n\n",
    ]
)


def tokens(count: int) -> Step:
    return answer(json.dumps({"tokens": list(range(count))}).encode())


async def count(tmp_path: Path, scripts: Sequence[Sequence[Step]], *bodies: bytes) -> tuple[list[str], float, float]:
    """What the upstream was asked for, and the tokens that were counted in and out."""
    async with ScriptedUpstream(scripts) as upstream:
        models = {"m": [provider(f"{upstream.base_url}/v1")]}
        async with run_gateway(tmp_path, models) as gateway:
            for body in bodies:
                assert (await gateway.chat(body)).status == 200
            text = (await gateway.ask("GET", "/metrics")).body.decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        counted = {s.labels["direction"]: s.value for s in samples if s.name == "helixflow_tokens_total"}
        return [request.target for request in upstream.requests], counted["in"], counted["out"]


async def test_by_the_servers_own_tokenizer(tmp_path: Path) -> None:
    asked, given, made = await count(tmp_path, [[SILENT], [tokens(7)], [tokens(5)]], ASKED)
    assert asked == ["/v1/chat/completions", "/tokenize", "/tokenize"]
    assert (given, made) == (7, 5)


async def test_of_a_stream_only_the_prompt(tmp_path: Path) -> None:
    asked, given, made = await count(tmp_path, [[*SILENT_STREAM], [tokens(7)]], STREAMED)
    assert asked == ["/v1/chat/completions", "/tokenize"]
    assert (given, made) == (7, 2), "an event a token"


async def test_by_length_where_there_is_none_and_not_asked_again(tmp_path: Path) -> None:
    asked, given, made = await count(tmp_path, [[SILENT], [NO_TOKENIZER], [SILENT]], ASKED, ASKED)
    assert asked == ["/v1/chat/completions", "/tokenize", "/v1/chat/completions"]
    assert given == 2 * -(-len(PROMPT) // 4)
    assert made == 2 * -(-len(REPLY) // 4)
