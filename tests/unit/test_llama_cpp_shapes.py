"""What our own engine's answers look like, and calls that a schema enforces."""

import json
from typing import Any

import pytest

from helixflow.core.call import Usage
from helixflow.core.errors import HelixError
from helixflow.dialects.openai_answers import ChatWriter, CompletionWriter
from helixflow.dialects.openai_chat import ChatParams, parse_chat
from helixflow.engines.llama_cpp.schema import check_schema
from helixflow.engines.llama_cpp.tools import ForcedTool
from helixflow.engines.media import check_media

TOOLS = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]


def params(**fields: Any) -> ChatParams:
    return parse_chat(json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}).encode())


def decode(event: bytes) -> dict[str, Any]:
    assert event.startswith(b"data: {")
    assert event.endswith(b"}\n\n")
    assert event.count(b"\n") == 2
    return dict(json.loads(event[6:]))


@pytest.mark.parametrize("include_usage", [True, False])
def test_chunks_of_a_chat_stream(include_usage: bool) -> None:
    writer = ChatWriter("chatcmpl-1", 5, 'na"me', "fp", include_usage=include_usage)
    common = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 5, "model": 'na"me',
              "system_fingerprint": "fp"}  # fmt: skip
    usage = {"usage": None} if include_usage else {}
    role = {"index": 2, "delta": {"role": "assistant", "content": "", "refusal": None}, "logprobs": None,
            "finish_reason": None}  # fmt: skip
    assert decode(writer.role(2)) == {**common, "choices": [role], **usage}
    content = {"index": 0, "delta": {"content": "a"}, "logprobs": None, "finish_reason": None}
    assert decode(writer.delta(0, b'{"content":"a"}')) == {**common, "choices": [content], **usage}
    end = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert decode(writer.chunk(0, {}, None, "stop")) == {**common, "choices": [end], **usage}
    numbers = decode(writer.usage(Usage(prompt_tokens=3, completion_tokens=4)))
    assert numbers["choices"] == []
    assert numbers["usage"]["total_tokens"] == 7


def test_a_completions_stream_is_of_its_own_object() -> None:
    writer = CompletionWriter("cmpl-1", 5, "m", "", include_usage=False)
    chunk = decode(writer.chunk(1, "text", None, "length"))
    assert chunk["object"] == "text_completion"
    assert chunk["choices"] == [{"index": 1, "text": "text", "logprobs": None, "finish_reason": "length"}]


@pytest.mark.parametrize(
    ("fields", "knows", "forced"),
    [
        ({}, False, False),
        ({"tools": TOOLS}, False, False),
        ({"tools": TOOLS, "tool_choice": "auto"}, False, False),
        ({"tools": TOOLS, "tool_choice": "none"}, False, False),
        ({"tools": TOOLS, "tool_choice": "required"}, False, True),
        ({"tools": TOOLS, "tool_choice": "required"}, True, False),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}, True, True),
    ],
)
def test_only_demanded_calls_are_enforced(fields: dict[str, Any], knows: bool, forced: bool) -> None:
    assert (ForcedTool.needed(params(**fields), template_knows_tools=knows) is not None) == forced


def test_a_named_function_leaves_no_other() -> None:
    named = {"type": "function", "function": {"name": "g"}}
    tool = ForcedTool.needed(params(tools=TOOLS, tool_choice=named), template_knows_tools=False)
    assert tool is not None
    schema = tool.response_format()["json_schema"]["schema"]
    assert schema["properties"]["name"] == {"const": "g"}
    calls = tool.tool_calls('{"name":"g","arguments":{"a": [1]}}', "1")
    assert calls == [{"id": "call_1", "type": "function", "function": {"name": "g", "arguments": '{"a": [1]}'}}]


@pytest.mark.parametrize("text", ["", '{"name":"g"', '{"name":"g","arguments":{"a"', '{"name":"g"}'])
def test_half_a_call_is_none(text: str) -> None:
    tool = ForcedTool.needed(params(tools=TOOLS, tool_choice="required"), template_knows_tools=False)
    assert tool is not None
    choice = {"index": 0, "message": {"role": "assistant", "content": text, "refusal": None}, "finish_reason": "length"}
    finished = tool.finish(choice, text, "1")
    assert finished["finish_reason"] == "length"
    assert finished["message"]["content"] is None
    assert "tool_calls" not in finished["message"]


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"type": "object", "properties": {"a": {"type": "array", "items": {"multipleOf": 2}}}}, "multipleOf"),
        ({"anyOf": [{"type": "string"}, {"uniqueItems": True}]}, "uniqueItems"),
        ({"$defs": {"x": {"if": {}}}}, "if"),
        ({"type": "string", "pattern": "^(?!a)b$"}, "pattern"),
        ({"type": "string", "pattern": "("}, "pattern"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused_by_keyword(schema: dict[str, Any], keyword: str) -> None:
    wanted = params(response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}})
    with pytest.raises(HelixError) as caught:
        check_schema(wanted)
    assert caught.value.traits.http == 400
    assert caught.value.param is not None
    assert caught.value.param.endswith(f".{keyword}")
    assert f"'{keyword}'" in caught.value.message


def test_names_that_look_like_keywords_are_no_keywords() -> None:
    schema = {"type": "object", "properties": {"not": {"type": "string"}, "if": {"const": 1}}, "required": ["not"]}
    check_schema(params(response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}))


def test_the_engine_is_sent_to_no_address() -> None:
    def asking(url: str) -> ChatParams:
        part = {"type": "image_url", "image_url": {"url": url}}
        return params(messages=[{"role": "user", "content": [{"type": "text", "text": "x"}, part]}])

    check_media(asking("data:image/png;base64,AAAA"))
    for url in ("http://169.254.169.254/", "https://example.org/a.png", "file:///etc/passwd", " data:,"):
        with pytest.raises(HelixError) as caught:
            check_media(asking(url))
        assert caught.value.param == "messages[0].content[1].image_url"
