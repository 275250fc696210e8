"""Other models while the gateway runs: calls that run are left alone, everything changes or nothing does."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from helixflow.core.errors import ErrorKind, HelixError, UserError
from helixflow.launch.gateway_serving import GatewayServing
from helixflow.settings.deployments import OpenAIDeployment
from helixflow.settings.models import ModelSettings
from helixflow.transport.testing import LAST_CHUNK, ScriptedUpstream, Send, Wait, answer, chunk
from tests.harness.gateway import RunningGateway, local, provider, run_gateway
from tests.harness.wire import request

HELLO = b'{"model":"m","messages":[{"role":"user","content":"hi"}]}'
STREAM = HELLO[:-1] + b',"stream":true}'
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
PIECE = (
    b'data: {"id":"a","object":"chat.completion.chunk","created":1,"model":"x","choices":[{"index":0,'
    b'"delta":{"content":"%b"},"finish_reason":%b}]}\n\n'
)
WHOLE = answer(
    b'{"id":"a","object":"chat.completion","created":1,"model":"x","choices":[{"index":0,"message":{"role":"assistant",'
    b'"content":"Hello"},"finish_reason":"stop"}],"usage":{"prompt_tokens":7,"completion_tokens":2}}',
    headers=[("content-type", "application/json")],
)


def slow(go: asyncio.Event) -> list[Any]:
    """An answer that stops after its first word until it may go on."""
    return [
        Send(HEAD),
        Send(chunk(PIECE % (b"Hel", b"null"))),
        Wait(go),
        Send(chunk(PIECE % (b"lo", b'"stop"'))),
        Send(chunk(b"data: [DONE]\n\n")),
        Send(LAST_CHUNK),
    ]


def model(*deployments: OpenAIDeployment, name: str = "m", **settings: Any) -> ModelSettings:
    return ModelSettings(name=name, deployments=deployments, **settings)


async def names(gateway: RunningGateway) -> list[str]:
    return [one["id"] for one in (await gateway.ask("GET", "/v1/models")).json["data"]]


async def apply(gateway: RunningGateway, *models: ModelSettings, metering: Any = None) -> None:
    await gateway.gateway._models.apply(models, metering)


async def test_a_stream_goes_on_while_its_deployment_is_taken_away(tmp_path: Path) -> None:
    go = asyncio.Event()
    async with (
        ScriptedUpstream([slow(go)]) as old,
        ScriptedUpstream([[WHOLE]]) as new,
        run_gateway(tmp_path, {"m": [provider(f"{old.base_url}/v1")]}) as gateway,
        await gateway.connect() as wire,
    ):
        wire.send(gateway.chat_request(STREAM))
        assert (await wire.read_head()).status == 200
        first = await wire.read_chunk()
        await apply(gateway, model(provider(f"{new.base_url}/v1"), aliases=["also"]))
        assert (await gateway.chat(HELLO.replace(b'"m"', b'"also"'))).status == 200
        assert await names(gateway) == ["m", "also"]
        await apply(gateway, model(provider("http://127.0.0.1:9/v1"), name="other"))
        assert (await gateway.chat(HELLO)).error["code"] == "model_not_found"
        go.set()
        pieces = [first or b""]
        while piece := await wire.read_chunk():
            pieces.append(piece)
        whole = b"".join(pieces)
        assert piece == b"", "the stream ends in good order"
        assert b'"Hel"' in whole and b'"lo"' in whole and whole.endswith(b"data: [DONE]\n\n")


async def test_what_stays_the_same_is_kept_with_its_connections(tmp_path: Path) -> None:
    async with (
        ScriptedUpstream([[WHOLE]] * 4) as upstream,
        run_gateway(tmp_path, {"m": [provider(f"{upstream.base_url}/v1")]}) as gateway,
    ):
        same = provider(f"{upstream.base_url}/v1")
        (target,) = gateway.gateway._models.router.routes["m"].targets
        await gateway.chat(HELLO)
        await apply(gateway, model(same), model(provider("http://127.0.0.1:9/v1"), name="other"))
        assert gateway.gateway._models.router.routes["m"].targets == [target]
        await gateway.chat(HELLO)
        # What only routing knows changes neither engine nor what is known of its health.
        await apply(gateway, model(same.model_copy(update={"weight": 5.0})))
        (heavier,) = gateway.gateway._models.router.routes["m"].targets
        assert (heavier.weight, heavier.engine, heavier.health) == (5, target.engine, target.health)
        await gateway.chat(HELLO)
        assert len(upstream.connections) == 1
        await apply(gateway, model(same.model_copy(update={"idle_timeout_s": 9.0})))
        assert (await gateway.chat(HELLO)).status == 200
        assert len(upstream.connections) == 2


async def test_weights_take_effect(tmp_path: Path) -> None:
    async with (
        ScriptedUpstream([[WHOLE]] * 40) as one,
        ScriptedUpstream([[WHOLE]] * 40) as other,
        run_gateway(tmp_path, {"m": [provider(f"{one.base_url}/v1")]}) as gateway,
    ):
        for weights in ((1, 0), (0, 1)):
            await apply(
                gateway,
                model(*(provider(f"{up.base_url}/v1", weight=w) for up, w in zip((one, other), weights, strict=True))),
            )
            before = len(one.requests), len(other.requests)
            for _ in range(5):
                assert (await gateway.chat(HELLO)).status == 200
            assert (len(one.requests) - before[0], len(other.requests) - before[1]) == (weights[0] * 5, weights[1] * 5)


async def test_one_deployment_that_cannot_be_built_leaves_everything_as_it_was(tmp_path: Path) -> None:
    async with (
        ScriptedUpstream([[WHOLE]]) as upstream,
        run_gateway(tmp_path, {"m": [provider(f"{upstream.base_url}/v1")]}) as gateway,
    ):
        keyed = provider("http://127.0.0.1:9/v1", api_key_file=tmp_path / "gone.key")
        with pytest.raises(UserError, match=r"new/openai-0: cannot read the secret file .*gone\.key"):
            await apply(gateway, model(local(), name="engine"), model(keyed, name="new"))
        assert await names(gateway) == ["m"]
        assert gateway.gateway._pools.rows() == [], "no slots are left of what was not taken"
        assert (await gateway.chat(HELLO)).status == 200


async def test_what_cannot_be_priced_is_not_served(tmp_path: Path) -> None:
    class Unpriced:
        async def prepare(self, _models: object) -> None:
            raise HelixError(ErrorKind.UNAVAILABLE, "The auth service is away.")

    async with run_gateway(tmp_path, {"m": [provider("http://127.0.0.1:9/v1")]}) as gateway:
        with pytest.raises(HelixError):
            await apply(gateway, model(provider("http://127.0.0.1:9/v1"), name="new"), metering=Unpriced())
        assert await names(gateway) == ["m"]


async def test_a_launched_deployment_keeps_who_waits_for_it(tmp_path: Path) -> None:
    async with run_gateway(tmp_path, {"m": [local(max_queue=3)]}) as gateway:
        pools = gateway.gateway._pools
        (target,) = gateway.gateway._models.router.routes["m"].targets
        await apply(gateway, model(local(max_queue=5, weight=2)))
        (changed,) = gateway.gateway._models.router.routes["m"].targets
        assert changed.slots is target.slots
        assert pools._launched["m/llama_cpp-0"].max_queue == 5
        await apply(gateway)
        assert (pools._launched, pools.rows()) == ({}, [])


async def test_a_key_file_that_changes_is_used_from_then_on(tmp_path: Path) -> None:
    key = tmp_path / "provider.key"
    key.write_text("sk-first")
    async with ScriptedUpstream([[WHOLE]] * 4) as upstream:
        keyed = provider(f"{upstream.base_url}/v1", api_key_file=key)
        async with run_gateway(
            tmp_path / "data", {"m": [keyed, provider(f"{upstream.base_url}/v1", tier=1)]}
        ) as gateway:
            models = gateway.gateway._models
            first, second = models.router.routes["m"].targets
            assert await models.renew_keys() == []
            await gateway.chat(HELLO)
            key.write_text("sk-second-one")
            assert await models.renew_keys() == ["m/openai-0"]
            await gateway.chat(HELLO)
            renewed, kept = models.router.routes["m"].targets
            assert renewed is not first and kept is second
            # Gone or empty: the one from before goes on, and nothing is said of its content.
            for spoil in (lambda: key.write_text(""), key.unlink):
                spoil()
                with capture_logs() as logs:
                    assert await models.renew_keys() == []
                assert [(line["event"], line["deployment"]) for line in logs] == [
                    ("deployment.key_unreadable", "m/openai-0")
                ]
                await gateway.chat(HELLO)
        sent = [recorded.headers["authorization"] for recorded in upstream.requests]
        assert sent == ["Bearer sk-first", "Bearer sk-second-one", "Bearer sk-second-one", "Bearer sk-second-one"]


async def test_the_gateway_says_what_it_serves_and_tries_again_what_passes(tmp_path: Path) -> None:
    """The follower, without a control process: what it is told, and what it would report."""
    async with run_gateway(tmp_path, {"m": [provider("http://127.0.0.1:9/v1")]}) as gateway:
        serving = GatewayServing(gateway.gateway._channel, gateway.gateway._models, None)
        follower = serving._follower
        refused = b'{"models":[{"name":"a","deployments":[{"engine":"openai","base_url":"x"}]}]}'
        with capture_logs() as logs:
            assert await follower._serve(5, refused)
        assert [line["event"] for line in logs if line["log_level"] == "error"] == ["configuration.refused"]
        assert (follower._revision, "base_url" in follower._problem) == (0, True)
        good = b'{"models":[{"name":"a","deployments":[{"engine":"openai","base_url":"http://127.0.0.1:9/v1"}]}]}'
        assert await follower._serve(6, good)
        assert (follower._revision, follower._problem, await names(gateway)) == (6, "", ["a"])


async def test_requests_find_either_all_of_a_change_or_nothing(tmp_path: Path) -> None:
    async with (
        ScriptedUpstream([[WHOLE]] * 20_000) as upstream,
        run_gateway(tmp_path, {"m": [provider(f"{upstream.base_url}/v1")]}) as gateway,
    ):
        stop = asyncio.Event()

        async def ask() -> set[int]:
            seen = set()
            async with await gateway.connect() as wire:
                while not stop.is_set():
                    seen.add((await wire.ask(request("POST", "/v1/chat/completions", HELLO, gateway.key))).status)
            return seen

        async with asyncio.TaskGroup() as group:
            askers = [group.create_task(ask()) for _ in range(3)]
            for number in range(20):
                changed = provider(f"{upstream.base_url}/v1", weight=1 + number % 3, idle_timeout_s=10 + number)
                await apply(gateway, model(changed), model(changed, name=f"other-{number}"))
            stop.set()
        assert set().union(*(asker.result() for asker in askers)) == {200}
