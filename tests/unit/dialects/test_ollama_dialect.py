"""Chat, completions and embeddings as Ollama's own API says them."""

import json
from typing import Any

import pytest

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.neutral import (
    End,
    Event,
    Failed,
    ReasoningDelta,
    StopReason,
    TextDelta,
    Tokens,
    ToolArguments,
    ToolStart,
)
from helixflow.dialects.ollama_chat import OllamaReader, write_request
from helixflow.dialects.ollama_completions import read_embed, write_embed, write_generate
from helixflow.dialects.openai_chat import parse_chat
from helixflow.dialects.openai_completions import parse_completion
from helixflow.dialects.openai_embeddings import parse_embedding
from helixflow.dialects.openai_neutral import read_request
from helixflow.dialects.validation import decode_fields

HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "look"}}


def write(**fields: Any) -> dict[str, Any]:
    raw = json.dumps({"model": "m", "messages": HELLO, **fields}).encode()
    body: dict[str, Any] = json.loads(write_request(read_request(parse_chat(raw), decode_fields(raw)), "up", 4096))
    return body


def generate(**fields: Any) -> dict[str, Any]:
    raw = json.dumps({"model": "m", "prompt": "Once", **fields}).encode()
    body: dict[str, Any] = json.loads(write_generate(parse_completion(raw), decode_fields(raw), "up", 4096))
    return body


def embed(given: Any, **fields: Any) -> dict[str, Any]:
    raw = json.dumps({"model": "m", "input": given, **fields}).encode()
    body: dict[str, Any] = json.loads(write_embed(parse_embedding(raw), "up"))
    return body


def test_the_plainest_chat_is_never_cut_in_silence() -> None:
    assert write() == {
        "model": "up",
        "messages": [{"role": "user", "content": "Hello"}],
        "stream": True,
        "truncate": False,
        "shift": False,
        "options": {"num_ctx": 4096},
    }


def test_options() -> None:
    body = write(max_tokens=7, temperature=1.5, top_p=0.9, stop="x", seed=3, presence_penalty=0.5, frequency_penalty=1)
    assert body["options"] == {
        "num_ctx": 4096,
        "num_predict": 7,
        "temperature": 1.5,
        "top_p": 0.9,
        "stop": ["x"],
        "seed": 3,
        "presence_penalty": 0.5,
        "frequency_penalty": 1,
    }


def test_messages() -> None:
    calls = [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"a":1}'}}]
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    body = write(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "What?"}, image]},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "c1", "content": "red"},
        ]
    )
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What?", "images": ["AAAA"]},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c1", "function": {"index": 0, "name": "look", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "tool_name": "look", "tool_call_id": "c1", "content": "red"},
    ]


def test_formats_and_thinking() -> None:
    assert write(response_format={"type": "json_object"})["format"] == "json"
    schema = {"type": "object"}
    given = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert write(response_format=given)["format"] == schema
    assert write(reasoning_effort="high")["think"] == "high"
    assert write(reasoning_effort="none")["think"] is False
    assert write(think=True, keep_alive="10m")["keep_alive"] == "10m"


def test_tools() -> None:
    assert write(tools=[TOOL])["tools"][0]["function"]["parameters"] == {"type": "object", "properties": {}}
    assert "tools" not in write(tools=[TOOL], tool_choice="none")


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("n", {"n": 2}),
        ("logprobs", {"logprobs": True}),
        ("logit_bias", {"logit_bias": {"1": 1}}),
        ("tool_choice", {"tools": [TOOL], "tool_choice": "required"}),
        ("tool_choice", {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "look"}}}),
        ("parallel_tool_calls", {"tools": [TOOL], "parallel_tool_calls": False}),
        ("reasoning_effort", {"reasoning_effort": "xhigh"}),
        (
            "messages[0].content",
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://a.example/b"}}]}
                ]
            },
        ),
    ],
)
def test_what_cannot_be_said_is_refused_by_name(param: str, fields: dict[str, Any]) -> None:
    with pytest.raises(HelixError) as error:
        write(**fields)
    assert (error.value.kind, error.value.param) == (ErrorKind.UNSUPPORTED, param)


def test_a_completion() -> None:
    assert generate(temperature=0, seed=1, stop=["a"]) == {
        "model": "up",
        "prompt": "Once",
        "stream": True,
        "truncate": False,
        "shift": False,
        "raw": True,
        "options": {"num_ctx": 4096, "num_predict": 16, "temperature": 0, "stop": ["a"], "seed": 1},
    }
    middle = generate(suffix="end")
    assert (middle["suffix"], "raw" in middle) == ("end", False)


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("n", {"n": 2}),
        ("best_of", {"best_of": 2}),
        ("echo", {"echo": True}),
        ("logprobs", {"logprobs": 0}),
        ("prompt", {"prompt": ["a", "b"]}),
        ("prompt", {"prompt": [1, 2]}),
    ],
)
def test_a_completion_that_cannot_be(param: str, fields: dict[str, Any]) -> None:
    with pytest.raises(HelixError) as error:
        generate(**fields)
    assert (error.value.kind, error.value.param) == (ErrorKind.UNSUPPORTED, param)


def test_embeddings() -> None:
    assert embed("a", dimensions=8) == {"model": "up", "input": ["a"], "truncate": False, "dimensions": 8}
    assert embed(["a", "b"])["input"] == ["a", "b"]
    with pytest.raises(HelixError) as error:
        embed([[1, 2]])
    assert error.value.param == "input"
    answer = read_embed(b'{"embeddings":[[1,2.5],[3,4]],"prompt_eval_count":7}', 2)
    assert (answer.embeddings, answer.prompt_eval_count) == ([[1, 2.5], [3, 4]], 7)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"<html>",
        b'{"embeddings":[]}',
        b'{"embeddings":[[1],[2]]}',
        b'{"embeddings":["x"]}',
        b'{"error":"x"}',
    ],
)
def test_embeddings_that_are_none(body: bytes) -> None:
    with pytest.raises(HelixError) as error:
        read_embed(body, 1)
    assert error.value.kind is ErrorKind.UPSTREAM_INVALID


def read(*lines: dict[str, Any]) -> tuple[list[Event], OllamaReader]:
    reader = OllamaReader("call_")
    return reader.feed(b"".join(json.dumps(line).encode() + b"\n" for line in lines)), reader


def said(content: str, **fields: Any) -> dict[str, Any]:
    return {"model": "m", "message": {"role": "assistant", "content": content, **fields}, "done": False}


def test_an_answer() -> None:
    events, reader = read(
        said("", thinking="hm"),
        said("Hi"),
        {**said(""), "done": True, "done_reason": "stop", "prompt_eval_count": 5, "eval_count": 2},
        said("late"),
    )
    assert events == [ReasoningDelta("hm"), TextDelta("Hi"), Tokens(5, 2), End(StopReason.END)]
    assert reader.done


def test_calls_have_ids_and_their_arguments_are_text() -> None:
    events, _ = read(
        said("", tool_calls=[{"function": {"name": "look", "arguments": {"a": "ü"}}}]),
        said("", tool_calls=[{"id": "own", "function": {"name": "go", "arguments": None}}]),
        {**said(""), "done": True, "done_reason": "stop"},
    )
    assert events[0] == ToolStart(0, "call_0", "look")
    assert isinstance(events[1], ToolArguments)
    assert json.loads(events[1].json) == {"a": "ü"}
    assert events[2:] == [ToolStart(1, "own", "go"), ToolArguments(1, "{}"), End(StopReason.TOOL_CALLS)]


def test_a_completion_and_why_it_ended() -> None:
    events, _ = read({"response": "x", "done": False}, {"response": "", "done": True, "done_reason": "length"})
    assert events == [TextDelta("x"), End(StopReason.LENGTH)]


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b'{"error":"model runner has unexpectedly stopped"}', ErrorKind.UPSTREAM_UNAVAILABLE),
        (b"<html>", ErrorKind.UPSTREAM_INVALID),
        (b'{"message":7}', ErrorKind.UPSTREAM_INVALID),
        (b'{"message":{"content":"\xff"}}', ErrorKind.UPSTREAM_INVALID),
        (b'{"message":{"tool_calls":[{"function":{"name":"x","arguments":[1]}}]}}', ErrorKind.UPSTREAM_INVALID),
    ],
)
def test_a_line_that_ends_it(line: bytes, kind: ErrorKind) -> None:
    reader = OllamaReader("")
    events = reader.feed(json.dumps(said("Hi")).encode() + b"\n" + line + b"\n")
    assert events[0] == TextDelta("Hi")
    assert isinstance(failed := events[-1], Failed)
    assert failed.error.kind is kind
