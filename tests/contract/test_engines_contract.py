"""What every kind of engine does alike, whatever it speaks with its server: see `tests/harness/engine_kinds.py`."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from helixflow.core.call import Call, Completer, Operation
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.engines.answers import WholeAnswer
from helixflow.engines.llama_cpp.engine import LlamaCppEngine
from helixflow.pool.store import StoredModel
from helixflow.routing.probes import Probed
from helixflow.settings.deployments import LlamaCppDeployment
from helixflow.transport.client import HttpClient
from tests.harness.engine import RunningEngine, run_engine
from tests.harness.engine_kinds import KINDS, FixedSlots, Subject, make_call

# A slot must be free after 0.2 s; a machine that does many things at once is given more.
FREED_S = 20.0
COUNT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "You count."},
        {"role": "user", "content": "Count: one, two, three"},
    ],
    "temperature": 0,
    "max_tokens": 8,
}
ENDLESS: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Tell a story for ever and ever"}],
    "temperature": 0,
    "max_tokens": 400,
    "stop": ["\x01"],
}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(params=KINDS)
async def subject(request: pytest.FixtureRequest, engine: RunningEngine) -> AsyncIterator[Subject]:
    async with KINDS[request.param](engine) as subject:
        yield subject


async def ask(subject: Subject, body: dict[str, Any], operation: Operation = Operation.CHAT) -> tuple[Any, Call]:
    """A whole answer, decoded."""
    call = make_call(operation, body)
    answer = await subject.engine.open(call)
    assert isinstance(answer, WholeAnswer)
    return json.loads(answer.body), call


async def stream(
    subject: Subject, body: dict[str, Any], operation: Operation = Operation.CHAT
) -> tuple[list[dict[str, Any]], Call]:
    """The chunks of a streamed answer that ends as it should."""
    call = make_call(operation, {**body, "stream": True})
    answer = await subject.engine.open(call)
    raw = b""
    while piece := await answer.read():
        assert piece.endswith(b"\n\n"), "whole events only"
        raw += piece
    answer.close()
    events = [event for event in raw.split(b"\n\n") if event]
    assert events[-1] == b"data: [DONE]"
    assert all(event.startswith(b"data: {") for event in events[:-1])
    return [json.loads(event[6:]) for event in events[:-1]], call


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


async def test_a_whole_answer(subject: Subject) -> None:
    body, call = await ask(subject, COUNT)
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == "m"
    (choice,) = body["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    assert choice["finish_reason"] in ("stop", "length")
    usage = call.progress.usage
    assert usage.reported
    assert body["usage"]["prompt_tokens"] == usage.prompt_tokens > 0
    assert 0 < body["usage"]["completion_tokens"] == usage.completion_tokens <= 8
    assert body["usage"]["total_tokens"] == usage.prompt_tokens + usage.completion_tokens
    assert call.progress.finish_reason == choice["finish_reason"]
    assert call.progress.engine_began_at is not None


async def test_a_stream_says_the_same_as_a_whole_answer(subject: Subject) -> None:
    whole, _ = await ask(subject, COUNT)
    chunks, call = await stream(subject, COUNT)
    assert text_of(chunks) == whole["choices"][0]["message"]["content"]
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert all(chunk["object"] == "chat.completion.chunk" and chunk["model"] == "m" for chunk in chunks)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert reasons == [whole["choices"][0]["finish_reason"]]
    assert not any("usage" in chunk for chunk in chunks), "nobody asked"
    assert call.progress.complete
    assert call.progress.usage.reported


async def test_usage_in_a_stream_comes_last_and_once(subject: Subject) -> None:
    chunks, call = await stream(subject, {**COUNT, "stream_options": {"include_usage": True}})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["prompt_tokens"] == call.progress.usage.prompt_tokens
    assert chunks[-1]["usage"]["completion_tokens"] == call.progress.usage.completion_tokens
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


async def test_the_servers_own_count_is_told(subject: Subject) -> None:
    if subject.server is None:
        pytest.skip("a real engine counts for itself")
    _, call = await ask(subject, COUNT)
    used = subject.server.usage
    assert (call.progress.usage.prompt_tokens, call.progress.usage.completion_tokens) == (used.prompt, used.completion)


async def test_no_more_tokens_than_asked_for(subject: Subject) -> None:
    body, call = await ask(subject, {**ENDLESS, "max_tokens": 5})
    assert body["choices"][0]["finish_reason"] == "length"
    assert call.progress.usage.completion_tokens <= 5


async def test_a_stop_sequence_ends_the_answer_and_is_not_in_it(subject: Subject) -> None:
    whole = (await ask(subject, COUNT))[0]["choices"][0]["message"]["content"]
    stop = whole.split()[2]
    body, _ = await ask(subject, {**COUNT, "stop": stop})
    assert body["choices"][0]["finish_reason"] == "stop"
    text = body["choices"][0]["message"]["content"]
    assert stop not in text
    assert whole.startswith(text.rstrip())
    chunks, _ = await stream(subject, {**COUNT, "stop": [stop]})
    assert text_of(chunks) == text


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_tool_call(subject: Subject, streamed: bool) -> None:
    if subject.server is None and not subject.forces_tools:
        pytest.skip("its model calls no tools")
    body = {
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "tools": [TOOL],
        "tool_choice": "required" if subject.forces_tools else "auto",
        "temperature": 0,
        "max_tokens": 32,
    }
    if streamed:
        chunks, _ = await stream(subject, body)
        pieces = [
            piece
            for chunk in chunks
            for choice in chunk["choices"]
            for piece in choice["delta"].get("tool_calls") or ()
        ]
        assert pieces[0]["id"]
        assert pieces[0]["type"] == "function"
        assert {piece["index"] for piece in pieces} == {0}
        name = pieces[0]["function"]["name"]
        arguments = "".join(piece["function"].get("arguments") or "" for piece in pieces)
        reason = chunks[-1]["choices"][0]["finish_reason"]
    else:
        answer, _ = await ask(subject, body)
        (call,) = answer["choices"][0]["message"]["tool_calls"]
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        reason = answer["choices"][0]["finish_reason"]
    assert name == "get_weather"
    assert isinstance(json.loads(arguments)["city"], str)
    assert reason == "tool_calls"


async def test_parallel_calls_and_their_results(subject: Subject) -> None:
    if subject.server is None:
        pytest.skip("its model makes one call")
    body = {"messages": [{"role": "user", "content": "weather weather"}], "tools": [TOOL]}
    answer, _ = await ask(subject, body)
    message = answer["choices"][0]["message"]
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": f"sunny {index}"}
        for index, call in enumerate(message["tool_calls"])
    ]
    follow_up = {"messages": [*body["messages"], message, *results], "tools": [TOOL], "tool_choice": "none"}
    call = make_call(Operation.CHAT, follow_up)
    await subject.engine.open(call)
    sent = json.dumps(subject.server.bodies[-1])
    assert "sunny 0" in sent
    assert "sunny 1" in sent


async def test_reasoning_is_kept_apart(subject: Subject) -> None:
    if subject.server is None:
        pytest.skip("its model does not think")
    body = {"messages": [{"role": "user", "content": "think"}]}
    answer, _ = await ask(subject, body)
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"][:3]) == ("hmm", "one")
    chunks, _ = await stream(subject, body)
    thoughts = [c["delta"].get("reasoning_content") for chunk in chunks for c in chunk["choices"]]
    assert [thought for thought in thoughts if thought] == ["hmm"]


async def test_a_completion(subject: Subject) -> None:
    body = {"prompt": "one, two,", "max_tokens": 6, "temperature": 0}
    if not subject.completions:
        with pytest.raises(HelixError) as refused:
            await subject.engine.open(make_call(Operation.COMPLETIONS, body))
        assert refused.value.kind is ErrorKind.UNSUPPORTED
        return
    whole, call = await ask(subject, body, Operation.COMPLETIONS)
    assert whole["object"] == "text_completion"
    assert whole["id"].startswith("cmpl-")
    assert whole["choices"][0]["text"]
    assert whole["choices"][0]["finish_reason"] == "length"
    assert call.progress.usage.completion_tokens == 6
    chunks, _ = await stream(subject, body, Operation.COMPLETIONS)
    text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    assert text == whole["choices"][0]["text"]


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_request_that_is_too_long(subject: Subject, streamed: bool) -> None:
    text = "word " * (subject.context + 200)
    call = make_call(Operation.CHAT, {"messages": [{"role": "user", "content": text}], "stream": streamed})
    with pytest.raises(HelixError) as refused:
        await subject.engine.open(call)
    assert refused.value.kind is ErrorKind.CONTEXT_LENGTH_EXCEEDED
    assert refused.value.code == "context_length_exceeded"
    async with asyncio.timeout(FREED_S):
        await subject.become(0)


async def test_a_key_that_is_refused_is_not_the_callers_fault(subject: Subject) -> None:
    if subject.with_key is None:
        pytest.skip("it has no key of its own")
    with pytest.raises(HelixError) as refused:
        await subject.with_key("wrong").open(make_call(Operation.CHAT, COUNT))
    assert refused.value.kind is ErrorKind.UPSTREAM_UNAVAILABLE
    assert "credentials" in refused.value.message
    assert "wrong" not in refused.value.message


async def test_a_server_that_is_overloaded(subject: Subject) -> None:
    if subject.server is None:
        pytest.skip("a real engine is not overloaded")
    with pytest.raises(HelixError) as refused:
        await subject.engine.open(make_call(Operation.CHAT, {"messages": [{"role": "user", "content": "overload"}]}))
    assert refused.value.kind is ErrorKind.OVERLOADED


@pytest.mark.parametrize("streamed", [False, True])
async def test_until_the_first_word_a_failure_is_told_by_open(subject: Subject, streamed: bool) -> None:
    if subject.server is None:
        pytest.skip("a real engine does not die for us")
    call = make_call(Operation.CHAT, {"messages": [{"role": "user", "content": "die early"}], "stream": streamed})
    with pytest.raises(HelixError) as failed:
        await subject.engine.open(call)
    assert failed.value.kind in (ErrorKind.UPSTREAM_INVALID, ErrorKind.UPSTREAM_UNAVAILABLE)
    assert call.progress.first_content_at is None


async def test_after_it_by_read_and_what_came_is_kept(subject: Subject) -> None:
    if subject.server is None:
        pytest.skip("a real engine does not die for us")
    if subject.goes_on:
        pytest.skip("it goes on, which has tests of its own")
    call = make_call(Operation.CHAT, {"messages": [{"role": "user", "content": "die late"}], "stream": True})
    answer = await subject.engine.open(call)
    assert call.progress.first_content_at is not None
    raw = b""
    with pytest.raises(HelixError) as failed:
        while piece := await answer.read():
            raw += piece
    assert failed.value.kind in (ErrorKind.UPSTREAM_INVALID, ErrorKind.UPSTREAM_UNAVAILABLE)
    assert b"three" in raw
    assert b"[DONE]" not in raw
    assert not call.progress.complete
    assert call.progress.usage.completion_tokens >= 3
    answer.close()


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_client_that_leaves_frees_its_slot(subject: Subject, streamed: bool) -> None:
    if not (streamed or subject.notices_absence):
        pytest.skip("its server does not look")
    call = make_call(Operation.CHAT, {**ENDLESS, "stream": streamed})
    if streamed:
        answer = await subject.engine.open(call)
        assert await answer.read()
        answer.close()
    else:
        opening = asyncio.create_task(subject.engine.open(call))
        await subject.become(1)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
    left = time.monotonic()
    async with asyncio.timeout(FREED_S):
        await subject.become(0)
    assert time.monotonic() - left < FREED_S
    assert subject.client.stats().open == subject.client.stats().idle


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_deadline_ends_it(subject: Subject, streamed: bool) -> None:
    if not (streamed or subject.notices_absence):
        pytest.skip("its server does not look")
    call = make_call(Operation.CHAT, {**ENDLESS, "stream": streamed}, limit_s=0.3)
    with pytest.raises(HelixError) as late:
        answer = await subject.engine.open(call)
        while await answer.read():
            pass
    assert late.value.kind is ErrorKind.DEADLINE
    async with asyncio.timeout(FREED_S):
        await subject.become(0)


async def test_a_probe_asks_whether_the_server_is_there(subject: Subject) -> None:
    if subject.with_key is None or not isinstance(subject.engine, Probed):
        pytest.skip("its pool knows")
    deadline = asyncio.get_running_loop().time() + 60
    await subject.engine.probe(deadline)
    if subject.server is not None:
        assert subject.server.bodies == [None], "no generation"
        wrong = subject.with_key("wrong")
        assert isinstance(wrong, Probed)
        with pytest.raises(HelixError) as refused:
            await wrong.probe(deadline)
        assert refused.value.kind is ErrorKind.UPSTREAM_UNAVAILABLE


async def test_embeddings(subject: Subject) -> None:
    if not subject.embeddings:
        with pytest.raises(HelixError) as refused:
            await subject.engine.open(make_call(Operation.EMBEDDINGS, {"input": "one two"}))
        assert refused.value.kind in (ErrorKind.UNSUPPORTED, ErrorKind.UPSTREAM_UNAVAILABLE, ErrorKind.INVALID_REQUEST)
        return
    await check_embeddings(subject.engine, 3)


async def test_embeddings_of_a_model_of_ours(embedding_model: StoredModel) -> None:
    deployment = LlamaCppDeployment(engine="llama_cpp", task="embeddings", context=512, parallel=1, threads=1)
    with run_engine(deployment, embedding_model.path) as running:
        replica = replace(running.replica, tokenizer_path=str(embedding_model.tokenizer_path))
        client = HttpClient()
        engine = LlamaCppEngine(client, FixedSlots(replica), deployment="m/llama_cpp-0", task="embeddings")
        await check_embeddings(engine, 7)  # each text between [CLS] and [SEP]
        with pytest.raises(HelixError) as refused:
            await engine.open(make_call(Operation.CHAT, COUNT))
        assert refused.value.kind is ErrorKind.UNSUPPORTED
        await client.close()


async def check_embeddings(engine: Completer, prompt_tokens: int) -> None:
    call = make_call(Operation.EMBEDDINGS, {"input": ["one two", "three"], "encoding_format": "float"})
    answer = await engine.open(call)
    assert isinstance(answer, WholeAnswer)
    told = json.loads(answer.body)
    assert (told["object"], told["model"]) == ("list", "m")
    assert [entry["index"] for entry in told["data"]] == [0, 1]
    assert all(isinstance(number, float) for entry in told["data"] for number in entry["embedding"])
    assert told["usage"]["prompt_tokens"] == call.progress.usage.prompt_tokens == prompt_tokens


async def test_a_finished_stream_leaves_its_connection_to_the_next(subject: Subject) -> None:
    if not subject.keeps_connections:
        pytest.skip("it ends them with the last event")
    for _ in range(3):
        await stream(subject, {**COUNT, "max_tokens": 2})
    stats = subject.client.stats()
    assert (stats.open, stats.idle) == (1, 1)
