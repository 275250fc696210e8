"""The official `openai` SDK against the gateway and a real model: what its users rely on."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import jsonschema
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.contract.conftest import CONTEXT, Served
from tests.harness.wire import LIMIT_S, Answer, Wire, request

MODEL = "org/tiny:1"
PARIS: list[Any] = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is the capital of France?"},
]
COUNT: list[Any] = [{"role": "user", "content": "Count from one to twenty in words, separated by commas."}]
# The ends of a text are forbidden: a sampled answer may be empty otherwise.
WITHOUT_END = {"0": -100, "2": -100}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "population": {"type": "integer"}},
    "required": ["city", "population"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=served.base_url, api_key=served.key, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
async def aclient(served: Served) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=served.base_url, api_key=served.key, max_retries=0, timeout=60) as client:
        yield client


def test_models_are_listed_and_retrieved(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL, "loading", "broken"]
    model = client.models.retrieve(MODEL)
    assert (model.id, model.object) == (MODEL, "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


def test_a_greedy_answer_is_right_and_stable(client: OpenAI) -> None:
    answers = [
        client.chat.completions.create(model=MODEL, messages=PARIS, temperature=0, max_tokens=12) for _ in range(2)
    ]
    texts = [answer.choices[0].message.content or "" for answer in answers]
    assert "Paris" in texts[0]
    assert texts[0] == texts[1]
    usage = answers[0].usage
    assert usage is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    streamed = client.chat.completions.create(
        model=MODEL, messages=PARIS, temperature=0, max_completion_tokens=12, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == texts[0]


async def test_the_async_client_streams(aclient: AsyncOpenAI) -> None:
    stream = await aclient.chat.completions.create(
        model=MODEL, messages=PARIS, temperature=0, max_tokens=12, stream=True
    )
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert "Paris" in text


def test_headers_of_a_raw_response(client: OpenAI, served: Served) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=PARIS, max_tokens=1, extra_headers={"x-request-id": "req-mine"}
    )
    assert raw.headers["x-request-id"] == "req-mine"
    assert raw.headers["x-helixflow-model"] == MODEL
    assert raw.headers["x-helixflow-deployment"] == f"{MODEL}/llama_cpp-0"
    assert int(raw.headers["openai-processing-ms"]) > 0
    assert raw.parse().id.startswith("chatcmpl-")


async def ask(served: Served, path: str, body: dict[str, Any]) -> Answer:
    async with await Wire.connect(served.port) as wire:
        return await wire.ask(request("POST", f"/v1/{path}", json.dumps(body).encode(), served.key))


async def test_the_shape_of_a_whole_answer(served: Served) -> None:
    body = {"model": MODEL, "messages": PARIS, "max_tokens": 3, "temperature": 0}
    got = (await ask(served, "chat/completions", body)).json
    assert set(got) == {"id", "object", "created", "model", "choices", "usage", "system_fingerprint"}
    assert (got["object"], got["model"]) == ("chat.completion", MODEL)
    assert abs(got["created"] - time.time()) < 60
    (choice,) = got["choices"]
    assert set(choice) == {"index", "message", "logprobs", "finish_reason"}
    assert choice["message"].keys() == {"role", "content", "refusal"}
    assert (choice["message"]["role"], choice["message"]["refusal"]) == ("assistant", None)
    assert (choice["index"], choice["logprobs"], choice["finish_reason"]) == (0, None, "length")
    assert got["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("include_usage", [True, False])
@pytest.mark.parametrize("n", [1, 3])
async def test_the_shape_of_a_stream(served: Served, include_usage: bool, n: int) -> None:
    options = {"max_tokens": 4, "temperature": 0, "stream": True, "n": n}
    body: dict[str, Any] = {"model": MODEL, "messages": PARIS, **options}
    if include_usage:
        body["stream_options"] = {"include_usage": True}
    answer = await ask(served, "chat/completions", body)
    chunks = answer.chunks
    if include_usage:
        assert all("usage" in chunk for chunk in chunks)
        *chunks, last = chunks
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 4 * n
        assert last["usage"]["total_tokens"] == 4 * n + last["usage"]["prompt_tokens"]
        assert {chunk.pop("usage") for chunk in chunks} == {None}
    for chunk in chunks:
        assert set(chunk) == {"id", "object", "created", "model", "system_fingerprint", "choices"}
        assert (chunk["object"], chunk["model"]) == ("chat.completion.chunk", MODEL)
        assert set(chunk["choices"][0]) == {"index", "delta", "logprobs", "finish_reason"}
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    for index in range(n):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
        assert own[-1]["delta"] == {}
        assert own[-1]["finish_reason"] == "length"
        assert all(choice["finish_reason"] is None for choice in own[:-1])
        assert all(set(choice["delta"]) == {"content"} for choice in own[1:-1])
    assert b"event:" not in answer.body
    assert b"prompt_progress" not in answer.body


@pytest.mark.parametrize("n", [2, 5])
def test_n_may_exceed_the_slots(client: OpenAI, n: int) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=PARIS, n=n, max_tokens=3, temperature=1, seed=1, logit_bias=WITHOUT_END
    )
    assert [choice.index for choice in answer.choices] == list(range(n))
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3 * n
    single = client.chat.completions.create(model=MODEL, messages=PARIS, max_tokens=3)
    assert single.usage is not None
    assert answer.usage.prompt_tokens == single.usage.prompt_tokens


@pytest.mark.parametrize("stop", [" capital", ["zzz", "l of F"], "apit"])
def test_stop_works_across_tokens_and_in_streams(client: OpenAI, stop: str | list[str]) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": PARIS, "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**options).choices[0].message.content or ""
    cut = client.chat.completions.create(**options, stop=stop).choices[0]
    stops = [stop] if isinstance(stop, str) else stop
    expected = min((whole[: whole.index(s)] for s in stops if s in whole), key=len)
    assert cut.message.content == expected
    assert cut.finish_reason == "stop"
    streamed = client.chat.completions.create(**options, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == expected


@pytest.mark.parametrize("temperature", [0, 1.3])
def test_a_seed_repeats(client: OpenAI, temperature: float) -> None:
    def text(seed: int) -> str | None:
        answer = client.chat.completions.create(
            model=MODEL, messages=COUNT, seed=seed, temperature=temperature, max_tokens=8
        )
        return answer.choices[0].message.content

    assert text(7) == text(7)
    if temperature:
        assert len({text(seed) for seed in range(4)}) > 1


@pytest.mark.parametrize("top", [None, 0, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs(served: Served, top: int | None, stream: bool) -> None:
    body: dict[str, Any] = {
        "model": MODEL, "messages": PARIS, "max_tokens": 4, "temperature": 0, "logprobs": True, "stream": stream,
    }  # fmt: skip
    if top is not None:
        body["top_logprobs"] = top
    answer = await ask(served, "chat/completions", body)
    choices = [chunk["choices"][0] for chunk in answer.chunks] if stream else answer.json["choices"]
    entries = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert len(entries) == 4
    for entry in entries:
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"}
        assert entry["logprob"] <= 0
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert len(entry["top_logprobs"]) == (top or 0)
        assert all(set(other) == {"token", "logprob", "bytes"} for other in entry["top_logprobs"])
    if stream:
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        assert choices[-1]["logprobs"] is None
    else:
        text = choices[0]["message"]["content"]
    assert text == "".join(entry["token"] for entry in entries)


def test_too_many_top_logprobs_are_refused_in_streams_too(client: OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(
                model=MODEL, messages=PARIS, logprobs=True, top_logprobs=21, stream=stream, max_tokens=1
            )
        assert caught.value.param == "top_logprobs"


def test_json_object(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": 'Answer with {"ok": true} and nothing else.'}],
        response_format={"type": "json_object"},
        temperature=0,
        max_tokens=40,
    )
    text = answer.choices[0].message.content or ""
    assert text.lstrip().startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_a_schema_is_kept_to(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Describe Paris."}],
        response_format={"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": SCHEMA}},
        temperature=0,
        max_tokens=60,
    )
    assert answer.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(answer.choices[0].message.content or ""), SCHEMA)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("schema", "word"), [({"type": "nonsense"}, "nonsense"), ({"$ref": "#/nowhere"}, "nowhere"), ({"type": 3}, "type")]
)
def test_an_unusable_schema_is_refused(client: OpenAI, schema: dict[str, object], word: str, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=MODEL,
            messages=PARIS,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
            max_tokens=1,
            stream=stream,
        )
    assert word in caught.value.message


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_demanded_tool_is_called(client: OpenAI, choice: Any) -> None:
    other = {"type": "function", "function": {"name": "get_time"}}
    tools = [WEATHER] if choice == "required" else [other, WEATHER]
    options: dict[str, Any] = {
        "model": MODEL, "messages": [{"role": "user", "content": "Weather in Paris?"}], "tools": tools,
        "tool_choice": choice, "temperature": 0, "max_tokens": 60,
    }  # fmt: skip
    answer = client.chat.completions.create(**options).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    (call,) = answer.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "get_weather"
    jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])
    chunks = list(client.chat.completions.create(**options, stream=True))
    pieces = [piece for chunk in chunks for piece in chunk.choices[0].delta.tool_calls or []]
    assert (pieces[0].index, pieces[0].type, pieces[0].id is not None) == (0, "function", True)
    assert json.loads("".join(p.function.arguments or "" for p in pieces if p.function)) == json.loads(
        call.function.arguments
    )
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_demanded_tool_cut_short_is_no_half_call(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=PARIS, tools=[WEATHER], tool_choice="required", max_tokens=3
    )
    assert answer.choices[0].finish_reason == "length"
    assert not answer.choices[0].message.tool_calls


@pytest.mark.parametrize("choice", ["auto", "none", None])
def test_a_tool_that_is_not_demanded_may_be_left_alone(client: OpenAI, choice: Any) -> None:
    options = {} if choice is None else {"tool_choice": choice}
    answer = client.chat.completions.create(
        model=MODEL, messages=PARIS, tools=[WEATHER], temperature=0, max_tokens=4, **options
    )
    assert answer.choices[0].finish_reason in ("length", "stop", "tool_calls")


def test_prompt_and_answer_over_the_context_are_refused_with_the_numbers(client: OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=MODEL, messages=PARIS, max_tokens=CONTEXT, stream=stream)
        assert caught.value.code == "context_length_exceeded"
        assert caught.value.param == "messages"
        assert str(CONTEXT) in caught.value.message
        long: Any = [{"role": "user", "content": "word " * (CONTEXT + 10)}]
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=MODEL, messages=long, max_tokens=5, stream=stream)
        assert caught.value.code == "context_length_exceeded"
        assert str(CONTEXT) in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x", max_tokens=CONTEXT)
    assert caught.value.param == "prompt"


def test_a_developer_message_is_understood(client: OpenAI) -> None:
    messages: list[Any] = [{"role": "developer", "content": "You are a helpful assistant."}, PARIS[1]]
    answer = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=12)
    assert "Paris" in (answer.choices[0].message.content or "")


def test_legacy_completions(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=["The capital of France is", "One, two,"], n=2, max_tokens=3, temperature=0, logprobs=2
    )
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in answer.choices]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    assert "Paris" in texts[0]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    alone = [
        client.completions.create(model=MODEL, prompt=prompt, max_tokens=1).usage
        for prompt in ("The capital of France is", "One, two,")
    ]
    assert answer.usage.prompt_tokens == sum(usage.prompt_tokens for usage in alone if usage)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == texts[0]
    assert len(logprobs.token_logprobs or []) == 3
    assert all(len(top) == 2 for top in logprobs.top_logprobs or [])
    assert (logprobs.text_offset or [])[0] == 0


def test_legacy_completions_echo_and_token_ids(client: OpenAI) -> None:
    prompt = "The capital of France is"
    ids = [504, 3575, 282, 4649, 314]
    options: dict[str, Any] = {"model": MODEL, "max_tokens": 3, "temperature": 0}
    plain = client.completions.create(**options, prompt=prompt).choices[0].text
    assert client.completions.create(**options, prompt=prompt, echo=True).choices[0].text == prompt + plain
    by_ids = client.completions.create(**options, prompt=ids, echo=True).choices[0].text
    assert by_ids == prompt + plain
    streamed = list(client.completions.create(**options, prompt=[prompt, prompt], echo=True, stream=True))
    for index in (0, 1):
        own = [c.choices[0] for c in streamed if c.choices[0].index == index]
        assert "".join(choice.text for choice in own) == prompt + plain
        assert [choice.finish_reason for choice in own if choice.finish_reason] == ["length"]


def test_legacy_completions_best_of(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="One, two,", best_of=3, n=1, max_tokens=3, temperature=1, seed=3, logit_bias=WITHOUT_END
    )
    assert len(answer.choices) == 1
    assert answer.choices[0].logprobs is None
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 9


def test_what_the_engine_cannot_do_is_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt="x", suffix="y")
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model=MODEL, input="x")
    with pytest.raises(openai.BadRequestError):
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": [image]}],
            max_tokens=1,  # type: ignore[list-item]
        )


def test_errors_are_the_sdks_own_classes(client: OpenAI, served: Served) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.AuthenticationError) as unauthenticated:
        client.with_options(api_key="hfk_wrong").models.list()
    assert unauthenticated.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError) as missing:
        create(model="org/tiny:2", messages=PARIS)
    assert missing.value.code == "model_not_found"
    assert MODEL in missing.value.message
    with pytest.raises(openai.BadRequestError) as bad:
        create(model=MODEL, messages=[])
    assert (bad.value.param, bad.value.type) == ("messages", "invalid_request_error")
    with pytest.raises(openai.APIStatusError) as large:
        create(model=MODEL, messages=[{"role": "user", "content": "x" * 30_000_000}])
    assert large.value.status_code == 413
    with pytest.raises(openai.InternalServerError) as down:
        create(model="broken", messages=PARIS)
    assert down.value.status_code == 502
    with pytest.raises(openai.InternalServerError) as loading:
        create(model="loading", messages=PARIS)
    assert loading.value.status_code == 503
    assert loading.value.response.headers["retry-after"] == "3"
    with pytest.raises(openai.APIConnectionError):
        client.with_options(base_url="http://127.0.0.1:9/v1").models.list()


LONG_PROMPT = [{"role": "user", "content": "many words " * 800}]


@pytest.mark.parametrize(
    ("messages", "stream", "started"),
    [(COUNT, True, True), (COUNT, False, True), (LONG_PROMPT, True, False), (LONG_PROMPT, False, False)],
)
async def test_a_client_that_leaves_frees_the_slot(
    served: Served, messages: list[Any], stream: bool, started: bool
) -> None:
    options = {"max_tokens": 1500 if started else 400, "stream": stream, "ignore_eos": True, "n": 1}
    body = {"model": MODEL, "messages": messages, **options}
    async with await Wire.connect(served.port) as wire:
        wire.send(request("POST", "/v1/chat/completions", json.dumps(body).encode(), served.key))
        if stream and started:
            await wire.read_head()
            await wire.read_chunk()
        async with asyncio.timeout(LIMIT_S):
            while not await asyncio.to_thread(lambda: served.engine.busy_slots):
                pass
        wire.drop()
        # A prefill ends with the batch under way, which takes long where other processes use the cores.
        async with asyncio.timeout(6 if started else 20):
            while await asyncio.to_thread(lambda: served.engine.busy_slots):
                await asyncio.sleep(0.02)


async def test_a_client_that_leaves_the_queue_takes_nothing(served: Served) -> None:
    body = {"model": MODEL, "messages": COUNT, "max_tokens": 400, "stream": True, "ignore_eos": True, "n": 12}
    async with await Wire.connect(served.port) as wire:
        wire.send(request("POST", "/v1/chat/completions", json.dumps(body).encode(), served.key))
        await wire.read_head()
        wire.drop()
    async with asyncio.timeout(15):
        while await asyncio.to_thread(lambda: served.engine.busy_slots):
            pass
    answer = await ask(served, "chat/completions", {"model": MODEL, "messages": PARIS, "max_tokens": 1})
    assert answer.status == 200
