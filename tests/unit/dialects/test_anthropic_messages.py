"""Chat as Anthropic's API says it: requests, and streams of events."""

import json
from typing import Any

import pytest

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.anthropic_messages import MessagesReader, write_request
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
from helixflow.dialects.openai_chat import parse_chat
from helixflow.dialects.openai_neutral import read_request
from helixflow.dialects.validation import decode_fields

HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"properties": {"at": {"type": "string"}}}}}


def write(**fields: Any) -> dict[str, Any]:
    raw = json.dumps({"model": "claude", "messages": HELLO, **fields}).encode()
    body: dict[str, Any] = json.loads(write_request(read_request(parse_chat(raw), decode_fields(raw)), "up", 100))
    return body


def refused(**fields: Any) -> HelixError:
    with pytest.raises(HelixError) as error:
        write(**fields)
    return error.value


def test_the_plainest_request() -> None:
    assert write() == {
        "model": "up",
        "max_tokens": 100,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
        "stream": True,
    }


def test_parameters() -> None:
    body = write(max_completion_tokens=7, temperature=0.5, top_p=0.9, stop=["a", "b"], user="u", metadata={"k": "v"})
    assert (body["max_tokens"], body["temperature"], body["top_p"]) == (7, 0.5, 0.9)
    assert body["stop_sequences"] == ["a", "b"]
    assert not {"user", "metadata", "stop"} & set(body)
    assert write(stop="x")["stop_sequences"] == ["x"]


def test_a_temperature_above_one_is_sent_as_one() -> None:
    assert write(temperature=1.7)["temperature"] == 1


def test_instructions_go_first_wherever_they_stand() -> None:
    body = write(
        messages=[
            {"role": "system", "content": "one"},
            *HELLO,
            {"role": "developer", "content": [{"type": "text", "text": "two"}, {"type": "text", "text": ""}]},
            {"role": "assistant", "content": "Hi"},
            *HELLO,
        ]
    )
    assert body["system"] == "one\ntwo"
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]


def test_images() -> None:
    body = write(
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is this?"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}},
                    {"type": "image_url", "image_url": {"url": "https://a.example/b.jpg"}},
                ],
            }
        ]
    )
    assert [block.get("source") for block in body["messages"][0]["content"]] == [
        None,
        {"type": "base64", "media_type": "image/png", "data": "AAAA"},
        {"type": "url", "url": "https://a.example/b.jpg"},
    ]


@pytest.mark.parametrize("url", ["ftp://a/b", "data:text/plain;base64,AA", "data:image/png,AA", "data:", "x"])
def test_an_image_that_is_none(url: str) -> None:
    content = [{"type": "image_url", "image_url": {"url": url}}]
    error = refused(messages=[{"role": "user", "content": content}])
    assert (error.kind, error.param) == (ErrorKind.INVALID_VALUE, "messages[0].content[0].image_url.url")


def test_sounds_and_files_are_refused() -> None:
    content = [{"type": "text", "text": "x"}, {"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}}]
    error = refused(messages=[{"role": "user", "content": content}])
    assert (error.kind, error.param) == (ErrorKind.UNSUPPORTED, "messages[0].content[1]")


def test_calls_and_their_results() -> None:
    calls = [
        {"id": "call.1:a", "type": "function", "function": {"name": "look", "arguments": '{"at": "x"}'}},
        {"id": "c2", "type": "function", "function": {"name": "look", "arguments": ""}},
    ]
    body = write(
        messages=[
            *HELLO,
            {"role": "assistant", "content": "Let me see.", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "call.1:a", "content": "red"},
            {"role": "tool", "tool_call_id": "c2", "content": ""},
            {"role": "user", "content": "And?"},
        ],
        tools=[TOOL],
    )
    assistant, user = body["messages"][1:]
    assert assistant["content"] == [
        {"type": "text", "text": "Let me see."},
        {"type": "tool_use", "id": "call_1_a", "name": "look", "input": {"at": "x"}},
        {"type": "tool_use", "id": "c2", "name": "look", "input": {}},
    ]
    assert user["content"] == [
        {"type": "tool_result", "tool_use_id": "call_1_a", "content": [{"type": "text", "text": "red"}]},
        {"type": "tool_result", "tool_use_id": "c2"},
        {"type": "text", "text": "And?"},
    ]


def test_the_interface_before_tools() -> None:
    body = write(
        messages=[
            *HELLO,
            {"role": "assistant", "function_call": {"name": "look", "arguments": "{}"}},
            {"role": "function", "name": "look", "content": "red"},
        ]
    )
    use, result = body["messages"][1]["content"][0], body["messages"][2]["content"][0]
    assert use["id"] == result["tool_use_id"]


@pytest.mark.parametrize("arguments", ["[]", "{", "1", '{"a":"\\ud800"}'])
def test_arguments_that_are_no_object(arguments: str) -> None:
    calls = [{"id": "c", "type": "function", "function": {"name": "look", "arguments": arguments}}]
    error = refused(messages=[*HELLO, {"role": "assistant", "tool_calls": calls}])
    assert error.param == "messages[1].tool_calls[0].function.arguments"
    assert error.kind is ErrorKind.INVALID_VALUE


@pytest.mark.parametrize(
    ("choice", "parallel", "expected"),
    [
        (None, None, None),
        ("auto", True, None),
        ("auto", False, {"type": "auto", "disable_parallel_tool_use": True}),
        ("none", None, {"type": "none"}),
        ("required", None, {"type": "any"}),
        ("required", False, {"type": "any", "disable_parallel_tool_use": True}),
        ({"type": "function", "function": {"name": "look"}}, None, {"type": "tool", "name": "look"}),
    ],
)
def test_which_tools_may_be_called(choice: Any, parallel: bool | None, expected: dict[str, Any] | None) -> None:
    body = write(tools=[TOOL], tool_choice=choice, parallel_tool_calls=parallel)
    assert body.get("tool_choice") == expected
    assert body["tools"] == [
        {"name": "look", "input_schema": {"type": "object", "properties": {"at": {"type": "string"}}}}
    ]


def test_a_schema_for_the_answer() -> None:
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    body = write(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert body["output_config"] == {"format": {"type": "json_schema", "schema": schema}}
    error = refused(response_format={"type": "json_object"})
    assert (error.kind, error.param) == (ErrorKind.UNSUPPORTED, "response_format")
    assert "output_config" not in write(response_format={"type": "text"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("seed", 0),
        ("logprobs", True),
        ("logit_bias", {"5": 1}),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("reasoning_effort", "low"),
        ("modalities", ["text", "audio"]),
        ("no_such_thing", 1),
    ],
)
def test_what_cannot_be_said_is_refused_by_name(name: str, value: Any) -> None:
    error = refused(**{name: value})
    assert (error.kind, error.param, error.code) == (ErrorKind.UNSUPPORTED, name, "unsupported_parameter")
    assert name in error.message


def test_what_asks_for_nothing_is_not_refused() -> None:
    fields = {
        "n": 1,
        "logprobs": False,
        "logit_bias": {},
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "seed": None,
    }
    assert write(**fields, store=True, service_tier="auto", modalities=["text"]) == write()


def test_its_own_fields_pass() -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024}
    body = write(thinking=thinking, top_k=5)
    assert (body["thinking"], body["top_k"]) == (thinking, 5)


# Answers.


def sse(*events: dict[str, Any]) -> bytes:
    return b"".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in events)


START = {
    "type": "message_start",
    "message": {
        "usage": {
            "input_tokens": 5,
            "cache_creation_input_tokens": 20,
            "cache_read_input_tokens": 300,
            "output_tokens": 1,
        }
    },
}


def delta(index: int, kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": {"type": kind, **fields}}


def block(index: int, **fields: Any) -> dict[str, Any]:
    return {"type": "content_block_start", "index": index, "content_block": fields}


def end(reason: str) -> dict[str, Any]:
    return {
        "type": "message_delta",
        "delta": {"stop_reason": reason, "stop_sequence": None},
        "usage": {"output_tokens": 9},
    }


STOP = {"type": "message_stop"}


def read(data: bytes) -> tuple[list[Event], MessagesReader]:
    reader = MessagesReader()
    return reader.feed(data), reader


def test_text_reasoning_and_usage() -> None:
    events, reader = read(
        sse(
            START,
            {"type": "ping"},
            block(0, type="thinking", thinking=""),
            delta(0, "thinking_delta", thinking="hm"),
            delta(0, "signature_delta", signature="xx"),
            {"type": "content_block_stop", "index": 0},
            block(1, type="text", text=""),
            delta(1, "text_delta", text="Hi"),
            delta(1, "text_delta", text=""),
            delta(1, "citations_delta", citation={}),
            {"type": "something_new", "index": {"of": "another kind"}} | {"index": 1},
            {"type": "content_block_stop", "index": 1},
            end("end_turn"),
            STOP,
        )
    )
    assert events == [
        Tokens(325, 1, 300, final=False),
        ReasoningDelta("hm"),
        TextDelta("Hi"),
        Tokens(325, 9, 300),
        End(StopReason.END),
    ]
    assert reader.done


def test_calls_in_pieces_and_one_without_arguments() -> None:
    events, _ = read(
        sse(
            block(0, type="text", text=""),
            delta(0, "text_delta", text="So"),
            block(1, type="tool_use", id="toolu_1", name="look", input={}),
            delta(1, "input_json_delta", partial_json=""),
            delta(1, "input_json_delta", partial_json='{"at":'),
            delta(1, "input_json_delta", partial_json='"x"}'),
            {"type": "content_block_stop", "index": 1},
            block(2, type="tool_use", id="toolu_2", name="leave", input={}),
            {"type": "content_block_stop", "index": 2},
            block(3, type="tool_use", id="toolu_3", name="stay", input={"a": 1}),
            {"type": "content_block_stop", "index": 3},
            end("tool_use"),
        )
    )
    assert events[1:-2] == [
        ToolStart(0, "toolu_1", "look"),
        ToolArguments(0, '{"at":'),
        ToolArguments(0, '"x"}'),
        ToolStart(1, "toolu_2", "leave"),
        ToolArguments(1, "{}"),
        ToolStart(2, "toolu_3", "stay"),
        ToolArguments(2, '{"a":1}'),
    ]
    assert events[-1] == End(StopReason.TOOL_CALLS)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("end_turn", StopReason.END),
        ("stop_sequence", StopReason.END),
        ("pause_turn", StopReason.END),
        ("max_tokens", StopReason.LENGTH),
        ("model_context_window_exceeded", StopReason.LENGTH),
        ("refusal", StopReason.CONTENT_FILTER),
        ("something new", StopReason.END),
    ],
)
def test_why_it_ended(said: str, reason: StopReason) -> None:
    assert read(sse(end(said)))[0][-1] == End(reason)


def test_events_after_the_end_are_not_read() -> None:
    events, reader = read(sse(end("end_turn"), STOP, delta(0, "text_delta", text="more"), STOP))
    assert events[-1] == End(StopReason.END)
    assert reader.feed(b"rubbish\n\n") == []


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("overloaded_error", ErrorKind.OVERLOADED),
        ("rate_limit_error", ErrorKind.RATE_LIMITED),
        ("api_error", ErrorKind.UPSTREAM_UNAVAILABLE),
        ("authentication_error", ErrorKind.UPSTREAM_UNAVAILABLE),
        ("invalid_request_error", ErrorKind.INVALID_REQUEST),
    ],
)
def test_an_error_in_a_stream(kind: str, expected: ErrorKind) -> None:
    events, _ = read(sse(START, {"type": "error", "error": {"type": kind, "message": "no"}}, delta(0, "text_delta")))
    assert isinstance(failed := events[-1], Failed)
    assert failed.error.kind is expected
    assert events[:-1] == [Tokens(325, 1, 300, final=False)]


@pytest.mark.parametrize(
    "payload",
    [b"{", b"[]", b'{"type":5}', b'{"type":"x\xff"}', b'{"type":"a\x00"}', b'{"type":"content_block_delta","delta":7}'],
)
def test_what_is_no_event(payload: bytes) -> None:
    events, _ = read(sse(START) + b"data: " + payload + b"\n\n")
    assert isinstance(failed := events[-1], Failed)
    assert failed.error.kind is ErrorKind.UPSTREAM_INVALID
    assert failed.error.__cause__ is not None


def test_split_anywhere_it_reads_the_same() -> None:
    data = sse(START, block(0, type="text", text=""), delta(0, "text_delta", text="Grüße"), end("end_turn"), STOP)
    whole, _ = read(data)
    for size in (1, 2, 7):
        reader = MessagesReader()
        pieces = [data[start : start + size] for start in range(0, len(data), size)]
        assert [event for piece in pieces for event in reader.feed(piece)] == whole
        assert reader.done
