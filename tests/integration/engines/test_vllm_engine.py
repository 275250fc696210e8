"""The vLLM engine beyond what all engines have in common, over scripted servers: seams, adapters, limits, leases."""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest

from helixflow.core.call import Call, Operation
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.engines.answers import WholeAnswer
from helixflow.engines.launching import Settled
from helixflow.engines.vllm.engine import VllmEngine
from helixflow.engines.vllm.kind import VllmKind
from helixflow.settings.deployments import VllmDeployment
from helixflow.transport.client import HttpClient
from tests.harness.breaking import BreakingRelay, ListedSlots
from tests.harness.engine_kinds import make_call, replica_of
from tests.harness.model_server import KEY
from tests.harness.vllm_server import VllmServer

WORDS = "one two three four five six seven eight nine ten"
COUNT: dict[str, Any] = {"messages": [{"role": "user", "content": "Count for me"}], "stream": True}


@dataclass
class Setup:
    """An engine over a server that is reached through a relay, which may break, and over one that does not."""

    engine: VllmEngine
    slots: ListedSlots
    relay: BreakingRelay
    client: HttpClient
    first: VllmServer
    server: VllmServer


@asynccontextmanager
async def running(*, task: str = "chat", adapters: tuple[str, ...] = ()) -> AsyncIterator[Setup]:
    names = tuple(f"m:{adapter}" for adapter in adapters)
    async with AsyncExitStack() as stack:
        first, second = VllmServer(), VllmServer()
        await stack.enter_async_context(first)
        await stack.enter_async_context(second)
        relay = BreakingRelay(replica_of(first))
        await stack.enter_async_context(relay.serve())
        client = HttpClient()
        stack.push_async_callback(client.close)
        for server in (first, second):
            server.adapters = dict.fromkeys(names, "/a")
        slots = ListedSlots(
            [
                replace(replica_of(first, "one"), port=relay.port, adapters=names),
                replace(replica_of(second, "two"), adapters=names),
            ]
        )
        engine = VllmEngine(client, slots, deployment="m/vllm-0", public_model="m", task=task, adapters=adapters)
        yield Setup(engine, slots, relay, client, first, second)


async def read(setup: Setup, body: dict[str, Any], operation: Operation = Operation.CHAT) -> tuple[list[Any], Call]:
    """The chunks of a stream that ends as it should, and with a comment when it was resumed."""
    call = make_call(operation, body)
    stream = await setup.engine.open(call)
    raw = b""
    while piece := await stream.read():
        raw += piece
    stream.close()
    resumed = call.progress.resumed
    end = b": helixflow-resumed %d\n\ndata: [DONE]\n\n" % resumed if resumed else b"data: [DONE]\n\n"
    assert raw.endswith(end)
    events = raw.removesuffix(end).split(b"\n\n")[:-1]
    assert all(event.startswith(b"data: ") for event in events), "said once, and at the end"
    return [json.loads(event[6:]) for event in events], call


def text_of(chunks: list[Any]) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)


@pytest.mark.parametrize("operation", [Operation.CHAT, Operation.COMPLETIONS])
@pytest.mark.parametrize("events", [2, 5, 10])
async def test_a_stream_goes_on_from_another_replica(operation: Operation, events: int) -> None:
    body = COUNT if operation is Operation.CHAT else {"prompt": "Count for me", "max_tokens": 40, "stream": True}
    body = {**body, "stream_options": {"include_usage": True}}
    async with running() as setup:
        setup.relay.break_after(events)
        chunks, call = await read(setup, body, operation)
        assert setup.relay.broken == 1
        assert text_of(chunks) == WORDS
        assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
        assert {chunk["object"] for chunk in chunks} == {chunks[0]["object"]}
        reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
        assert [reason for reason in reasons if reason] == ["stop"]
        assert (chunks[-1]["usage"]["prompt_tokens"], chunks[-1]["usage"]["completion_tokens"]) == (3, 10)
        assert (call.progress.usage.prompt_tokens, call.progress.usage.completion_tokens) == (3, 10)
        assert call.progress.resumed == 1
        assert call.progress.complete
        assert all(lease.released for lease in setup.slots.leases)
        assert setup.slots.leases[0].failed
        assert "token_ids" not in json.dumps(chunks)


async def test_no_token_more_than_asked_for_over_a_seam() -> None:
    async with running() as setup:
        setup.relay.break_after(4)
        chunks, call = await read(setup, {**COUNT, "max_tokens": 6})
        assert text_of(chunks) == "one two three four five six"
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert call.progress.usage.completion_tokens == 6
        assert setup.server.bodies[-1]["max_tokens"] < 6


@pytest.mark.parametrize("more", [{"stop": ["!"]}, {"presence_penalty": 1}, {"logprobs": True}])
async def test_what_cannot_be_gone_on_with_exactly_ends_in_a_clear_error(more: dict[str, Any]) -> None:
    async with running() as setup:
        setup.relay.break_after(4)
        call = make_call(Operation.CHAT, {**COUNT, **more})
        stream = await setup.engine.open(call)
        with pytest.raises(HelixError) as lost:
            while await stream.read():
                pass
        stream.close()
        assert lost.value.kind is ErrorKind.UPSTREAM_UNAVAILABLE
        assert call.progress.resumed == 0
        assert all(lease.released for lease in setup.slots.leases)


async def test_before_the_first_word_another_replica_is_asked() -> None:
    async with running() as setup:
        setup.relay.break_after(1)
        chunks, call = await read(setup, COUNT)
        assert text_of(chunks) == WORDS
        assert call.progress.resumed == 0
        assert [lease.replica.replica_id for lease in setup.slots.leases[:1]] == ["one"]


@pytest.mark.parametrize("streamed", [True, False])
async def test_what_was_read_and_made_is_charged(streamed: bool) -> None:
    async with running() as setup:
        if streamed:
            await read(setup, COUNT)
        else:
            await setup.engine.open(make_call(Operation.CHAT, {**COUNT, "stream": False}))
        (lease,) = setup.slots.leases
        assert lease.charged == 3 + 10
        assert lease.released == 1 or streamed
        assert not lease.failed


@pytest.mark.parametrize(("alias", "sent"), [("m:legal", "m:legal"), ("another-alias", "m"), ("", "m")])
async def test_an_adapter_is_asked_for_by_its_name(alias: str, sent: str) -> None:
    async with running(adapters=("legal",)) as setup:
        call = make_call(Operation.CHAT, COUNT)
        call.alias = alias
        stream = await setup.engine.open(call)
        assert (alias or "m").encode() in await stream.read()
        stream.close()
        assert setup.first.bodies[0]["model"] == sent


async def test_an_adapter_is_asked_for_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(adapters=("legal",)) as setup:
        one, two = setup.slots.replicas()
        monkeypatch.setattr(setup.slots, "_replicas", [replace(one, adapters=()), two])
        call = make_call(Operation.CHAT, COUNT)
        call.alias = "m:legal"
        (await setup.engine.open(call)).close()
        (await setup.engine.open(make_call(Operation.CHAT, COUNT))).close()
        assert [lease.replica.replica_id for lease in setup.slots.leases] == ["two", "one"]
        monkeypatch.setattr(setup.slots, "_replicas", [replace(one, adapters=()), replace(two, adapters=())])
        with pytest.raises(HelixError, match="m:legal") as refused:
            await setup.engine.open(call)
        assert refused.value.kind is ErrorKind.UNAVAILABLE


async def test_adapters_become_what_the_settings_say() -> None:
    def deployment(**lora: str) -> VllmDeployment:
        return VllmDeployment(engine="vllm", model="m", lora=lora, max_loras=2)

    client = HttpClient()
    async with VllmServer() as server:
        kind, port = VllmKind(client), replica_of(server).port
        for wanted in ({"a": "/a", "b": "/b"}, {"b": "/other", "c": "/c"}, {}):
            settled = await kind.settle(deployment(**wanted), "m", port, KEY, 5)
            assert server.adapters == {f"m:{name}": path for name, path in wanted.items()}
            assert settled == Settled(tuple(server.adapters))
        settled = await kind.settle(deployment(a="/missing", b="/b"), "m", port, KEY, 5)
        assert settled.adapters == ("m:b",)
        assert settled.trouble == (
            "the adapter 'm:a' could not be loaded: Loading lora m:a failed: No adapter found for /missing"
        )
        asked = len(server.bodies)
        assert await kind.settle(VllmDeployment(engine="vllm", model="m"), "m", port, KEY, 5) == Settled()
        assert len(server.bodies) == asked, "its engine can have none"
    await client.close()


async def test_more_tokens_than_the_context_holds_are_the_callers_fault() -> None:
    async with running() as setup:
        for body in ({**COUNT, "max_tokens": 4000}, {"messages": [{"role": "user", "content": "a " * 600}]}):
            with pytest.raises(HelixError) as refused:
                await setup.engine.open(make_call(Operation.CHAT, body))
            assert refused.value.kind is ErrorKind.CONTEXT_LENGTH_EXCEEDED
            assert refused.value.param in ("messages", "max_tokens")
        assert not any(lease.failed for lease in setup.slots.leases)


async def test_images_by_address_are_refused() -> None:
    image = {"type": "image_url", "image_url": {"url": "http://10.0.0.1/secret.png"}}
    async with running() as setup:
        with pytest.raises(HelixError) as refused:
            await setup.engine.open(make_call(Operation.CHAT, {"messages": [{"role": "user", "content": [image]}]}))
        assert refused.value.kind is ErrorKind.UNSUPPORTED
        assert not setup.slots.leases


async def test_embeddings() -> None:
    async with running(task="embeddings") as setup:
        call = make_call(Operation.EMBEDDINGS, {"input": ["one two", "three"]})
        answer = await setup.engine.open(call)
        assert isinstance(answer, WholeAnswer)
        body = json.loads(answer.body)
        assert (len(body["data"]), body["model"]) == (2, "m")
        assert setup.slots.leases[0].charged == 3
        with pytest.raises(HelixError, match="embeddings"):
            await setup.engine.open(make_call(Operation.CHAT, COUNT))


async def test_what_the_pool_asks() -> None:
    deployment = VllmDeployment(
        engine="vllm", model="m", parallel=3, extra_arguments=("--enable-auto-tool-choice", "--tool-call-parser=hermes")
    )
    client = HttpClient()
    async with VllmServer(context=256) as server:
        kind, port = VllmKind(client), replica_of(server).port
        assert await kind.is_healthy(port, KEY, 5)
        properties = await kind.read_properties(deployment, port, KEY, 5)
        assert (properties.slots, properties.context, properties.supports_tools) == (3, 256, True)
        assert await kind.read_activity(port, KEY, 5) == 0
        slots = ListedSlots([replica_of(server)])
        engine = VllmEngine(client, slots, deployment="m/vllm-0", public_model="m", task="chat")
        endless = {"messages": [{"role": "user", "content": "for ever"}], "stream": True}
        stream = await engine.open(make_call(Operation.CHAT, endless))
        assert await kind.read_activity(port, KEY, 5) == 1
        stream.close()
        await server.become(0)
        with pytest.raises(HelixError) as refused:
            await kind.read_properties(deployment, port, "wrong", 5)
        assert refused.value.kind is ErrorKind.UPSTREAM_INVALID
    await client.close()
