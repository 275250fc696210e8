"""What the OpenAI dialects accept, and how they name what they do not."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.openai_chat import parse_chat
from helixflow.dialects.openai_completions import parse_completion
from helixflow.dialects.openai_embeddings import parse_embedding
from helixflow.dialects.openai_errors import render_error
from helixflow.dialects.validation import decode_fields

USER = {"role": "user", "content": "hi"}
CALLS = {"role": "assistant", "content": None, "tool_calls": [
    {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}  # fmt: skip
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
PARSERS = [parse_chat, parse_completion, parse_embedding]


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [USER], **fields}).encode()


def completion(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "prompt": "x", **fields}).encode()


def embedding(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "input": "x", **fields}).encode()


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0}, {"temperature": 2}, {"top_p": 1}, {"presence_penalty": -2}, {"frequency_penalty": 2.0},
        {"n": 128}, {"max_tokens": 1}, {"max_tokens": 5, "max_completion_tokens": 5}, {"seed": -(2**63)}, {"seed": 0},
        {"stop": "x"}, {"stop": ["a", "b", "c", "d"]}, {"stop": None}, {"logit_bias": {"50": -100, "7": 100}},
        {"logprobs": True, "top_logprobs": 20}, {"logprobs": True, "top_logprobs": 0}, {"unknown": {"deep": [1]}},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"response_format": {"type": "text"}}, {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "strict": True}}},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}, {"tool_choice": "none"},
        {"messages": [{"role": "system", "content": "s", "name": "x"}, {"role": "developer", "content": "d"}, USER]},
        {"messages": [USER, CALLS, {"role": "tool", "tool_call_id": "c1", "content": "42"}]},
        {"messages": [{"role": "user", "content": ""}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
        {"messages": [{"role": "function", "name": "f", "content": "x"}]},
        {"user": "u", "metadata": {"a": "b"}, "safety_identifier": "s"},
    ],
)  # fmt: skip
def test_chat_accepts(fields: dict[str, Any]) -> None:
    assert parse_chat(chat(**fields)).model == "m"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": 1}, "model"), ({"model": ""}, "model"), ({"model": None}, "model"), ({"messages": None}, "messages"),
        ({"messages": []}, "messages"), ({"messages": [3]}, "messages[0]"),
        ({"messages": [USER, {"role": "king", "content": "x"}]}, "messages[1].role"),
        ({"messages": [USER, {"role": "user"}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": [{"type": "film"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "tool_call_id": "c1", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [CALLS, {"role": "tool", "tool_call_id": "c2", "content": "x"}]}, "messages[1].tool_call_id"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"temperature": 2.1}, "temperature"), ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": -0.1}, "top_p"), ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"), ({"n": 0}, "n"), ({"n": 129}, "n"), ({"n": 1.5}, "n"),
        ({"max_tokens": 0}, "max_tokens"), ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"), ({"seed": "1"}, "seed"),
        ({"stop": [1]}, "stop[0]"), ({"stop": list("abcde")}, "stop"), ({"stop": 1}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"), ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"), ({"logit_bias": [1]}, "logit_bias"),
        ({"top_logprobs": 1}, "top_logprobs"), ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"), ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": ""}}}, "response_format.json_schema.name"),
        ({"tool_choice": "required"}, "tool_choice"), ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"function": {"name": "f"}}}, "tool_choice.type"),
        ({"tools": [{"type": "magic"}]}, "tools[0].type"),
        ({"tools": [TOOL, {"type": "function", "function": {"name": "a b"}}]}, "tools[1].function.name"),
        ({"tools": [TOOL] * 129}, "tools"), ({"metadata": {"a": 1}}, "metadata"),
    ],
)  # fmt: skip
def test_chat_refuses_and_names(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(HelixError) as caught:
        parse_chat(chat(**fields))
    assert caught.value.param == param
    assert caught.value.kind is ErrorKind.INVALID_VALUE
    assert caught.value.message.endswith(".")


def test_missing_fields_are_named() -> None:
    for body, parse, param in ((b"{}", parse_chat, "model"), (b'{"model":"m"}', parse_chat, "messages"),
                               (b'{"model":"m"}', parse_completion, "prompt"),
                               (b'{"model":"m"}', parse_embedding, "input")):  # fmt: skip
        with pytest.raises(HelixError) as caught:
            parse(body)
        assert caught.value.param == param
        assert "Missing required parameter" in caught.value.message


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("x", ["x"]), (["x", "y"], ["x", "y"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), ("", [""])],
)
def test_prompts_of_every_form(prompt: Any, prompts: Any) -> None:
    assert parse_completion(completion(prompt=prompt)).prompts == prompts


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"), ({"prompt": ["a", 1]}, "prompt"), ({"prompt": [1, [2]]}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"), ({"prompt": ["a", {}]}, "prompt[1]"), ({"prompt": ["a"] * 2049}, "prompt"),
        ({"prompt": ["a"] * 100, "n": 100}, "n"), ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"), ({"best_of": 21}, "best_of"), ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"), ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": -1}, "max_tokens"),
        ({"stream_options": {}}, "stream_options"), ({"echo": 1}, "echo"), ({"logit_bias": {"a": 1}}, "logit_bias"),
    ],
)  # fmt: skip
def test_completions_refuse_and_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(HelixError) as caught:
        parse_completion(completion(**fields))
    assert caught.value.param == param


def test_no_tokens_are_allowed_where_the_prompt_is_echoed() -> None:
    assert parse_completion(completion(max_tokens=0, echo=True)).max_tokens == 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"), ({"input": []}, "input"), ({"input": ["a", ""]}, "input[1]"),
        ({"input": [[1], []]}, "input[1]"), ({"input": ["a", 1]}, "input"), ({"input": ["a"] * 2049}, "input"),
        ({"input": 1}, "input"), ({"input": [True]}, "input[0]"), ({"encoding_format": "hex"}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
    ],
)  # fmt: skip
def test_embeddings_refuse_and_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(HelixError) as caught:
        parse_embedding(embedding(**fields))
    assert caught.value.param == param


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(
    [
        *("model", "messages", "prompt", "input", "stream", "stream_options", "n", "tools", "tool_choice", "stop"),
        *("logit_bias", "response_format", "role", "content", "type", "function", "name", "tool_calls", "json_schema"),
        *("schema", "logprobs", "top_logprobs", "echo", "best_of", "max_tokens", "metadata"),
    ]
)
REQUESTS = st.dictionaries(NAMES, JSON | st.dictionaries(NAMES, JSON) | st.lists(st.dictionaries(NAMES, JSON)))


@given(REQUESTS, st.sampled_from(PARSERS))
def test_no_json_causes_anything_but_a_request_or_a_clear_error(fields: dict[str, Any], parse: Any) -> None:
    body = json.dumps({"model": "m", "messages": [USER], "prompt": "x", "input": "x", **fields}).encode()
    try:
        decode_fields(body)
        parse(body)
    except HelixError as error:
        assert error.traits.http == 400
        assert set(json.loads(render_error(error))["error"]) == {"message", "type", "param", "code"}


@given(st.binary(max_size=60))
def test_no_bytes_cause_anything_but_fields_or_a_clear_error(body: bytes) -> None:
    try:
        fields = decode_fields(body)
    except HelixError as error:
        assert error.kind is ErrorKind.INVALID_JSON
    else:
        assert isinstance(json.loads(body), dict)
        assert set(fields) == set(json.loads(body))


def test_of_duplicate_fields_the_last_counts_for_the_check_and_for_what_is_forwarded() -> None:
    body = b'{"model":"m","prompt":"a","prompt":"b"}'
    assert parse_completion(body).prompts == ["b"]
    assert bytes(decode_fields(body)["prompt"]) == b'"b"'


def test_an_upstreams_own_code_is_kept_and_the_plainest_kind_has_none() -> None:
    plain = HelixError(ErrorKind.INVALID_REQUEST, "x")
    assert json.loads(render_error(plain)) == {
        "error": {"message": "x", "type": "invalid_request_error", "param": None, "code": None}
    }
    assert json.loads(render_error(HelixError(ErrorKind.INVALID_REQUEST, "x", code="odd")))["error"]["code"] == "odd"
