"""Hedging, ceilings and probes against servers on real sockets."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from helixflow.core.call import Call, Operation, Stream
from helixflow.core.clock import SystemClock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.engines.openai import OpenAIEngine
from helixflow.routing.balancing import Balancer
from helixflow.routing.retry_budget import RetryBudget
from helixflow.routing.router import Router
from helixflow.routing.table import build_table
from helixflow.routing.target import Target
from helixflow.settings.deployments import OpenAIDeployment
from helixflow.settings.models import ModelSettings
from helixflow.settings.serving import RoutingSettings
from helixflow.transport.client import HttpClient
from tests.harness.engine_kinds import make_call, provider_options
from tests.harness.model_server import Asked, Refusal, Writer
from tests.harness.provider_servers import OpenAIServer

HEDGE_AFTER_S = 0.05
# Promised are 0.2 s on a quiet machine; these answers would take for ever.
FREED_S = 10.0


class MoodyServer(OpenAIServer):
    """Says the role and then nothing while it `stalls`; refuses with `refusal`."""

    def __init__(self) -> None:
        super().__init__()
        self.stalls = False
        self.refusal: Refusal | None = None

    def ask(self, path: str, body: Any) -> Asked | bytes:
        if self.refusal is not None:
            raise self.refusal
        return super().ask(path, body)

    async def _count(self, asked: Asked, writer: Writer) -> AsyncIterator[bytes | str]:
        if self.stalls:
            await asyncio.Event().wait()
        async for piece in super()._count(asked, writer):
            yield piece


class Bench:
    """A model of two providers, the first of which is preferred."""

    def __init__(self, client: HttpClient, *servers: MoodyServer, **model: Any) -> None:
        clock, routing = SystemClock(), RoutingSettings()
        deployments = [
            OpenAIDeployment(engine="openai", name=name, base_url=server.base_url, tier=tier)
            for tier, (name, server) in enumerate(zip("ab", servers, strict=True))
        ]
        settings = ModelSettings(name="m", deployments=tuple(deployments), **model)
        self.targets = {}
        for name, deployment in settings.named_deployments():
            options = {**provider_options(deployment.base_url), "deployment": name}  # type: ignore[union-attr]
            engine = OpenAIEngine(client, **options)
            self.targets[name] = Target(
                name, engine, deployment, routing=routing, clock=clock, slots=None, limits=engine.limits
            )
        self.router = Router(
            build_table([settings], self.targets, created=0),
            balancer=Balancer.of(routing, clock),
            retries=RetryBudget(routing, clock),
            clock=clock,
        )


@pytest.fixture
async def servers() -> AsyncIterator[tuple[MoodyServer, MoodyServer]]:
    first, second = MoodyServer(), MoodyServer()
    async with first, second:
        yield first, second


@pytest.fixture
async def client() -> AsyncIterator[HttpClient]:
    client = HttpClient()
    yield client
    await client.close()


def streamed(prompt: str = "count please") -> Call:
    return make_call(Operation.CHAT, {"messages": [{"role": "user", "content": prompt}], "stream": True})


async def read_all(stream: Stream) -> bytes:
    body = b""
    while piece := await stream.read():
        body += piece
    return body


async def test_the_second_answers_and_the_first_is_cut_off_at_once(
    client: HttpClient, servers: tuple[MoodyServer, MoodyServer]
) -> None:
    slow, quick = servers
    slow.stalls = True
    bench = Bench(client, slow, quick, hedge_after_s=HEDGE_AFTER_S)
    call = streamed()
    stream = await bench.router.open(call)
    async with asyncio.timeout(FREED_S):
        await slow.become(0)
    body = await read_all(stream)
    stream.close()
    assert b"nine" in body
    assert body.endswith(b"data: [DONE]\n\n")
    progress = call.progress
    assert (progress.deployment, progress.usage.completion_tokens) == ("m/b", quick.usage.completion)
    assert progress.attempts == (("m/a", "hedged"),)
    (side,) = progress.side_usage
    assert (side.deployment, side.usage.completion_tokens) == ("m/a", 0)
    assert side.engine_ms >= HEDGE_AFTER_S * 1000
    assert [target.in_flight for target in bench.targets.values()] == [0, 0]
    assert not bench.targets["m/a"].health.is_ejected


async def test_a_client_that_leaves_ends_both(client: HttpClient, servers: tuple[MoodyServer, MoodyServer]) -> None:
    for server in servers:
        server.stalls = True
    bench = Bench(client, *servers, hedge_after_s=HEDGE_AFTER_S)
    opening = asyncio.create_task(bench.router.open(streamed()))
    for server in servers:
        await server.become(1)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    async with asyncio.timeout(FREED_S):
        for server in servers:
            await server.become(0)
    assert [target.in_flight for target in bench.targets.values()] == [0, 0]


async def test_what_a_provider_says_of_its_limits_is_kept(
    client: HttpClient, servers: tuple[MoodyServer, MoodyServer]
) -> None:
    first, second = servers
    bench = Bench(client, first, second)
    first.refusal = Refusal(
        429,
        {"error": {"message": "Slow down"}},
        {
            "x-ratelimit-limit-requests": "60",
            "x-ratelimit-remaining-requests": "0",
            "x-ratelimit-reset-requests": "10m0s",
        },
    )
    for _ in range(3):
        call = streamed()
        stream = await bench.router.open(call)
        stream.close()
        assert call.progress.deployment == "m/b"
    assert len(first.bodies) == 1, "it was not asked again"
    assert bench.targets["m/a"].ceiling.wait_s(1) > 5
    assert not bench.targets["m/a"].health.is_ejected, "it is not ill"


async def test_a_probe_asks_for_what_costs_nothing(
    client: HttpClient, servers: tuple[MoodyServer, MoodyServer]
) -> None:
    server, _ = servers
    engine = OpenAIEngine(client, **provider_options(server.base_url))
    deadline = asyncio.get_running_loop().time() + 60
    await engine.probe(deadline)
    assert server.bodies == [None]
    server.refusal = Refusal(500, {"error": {"message": "no"}})
    with pytest.raises(HelixError) as caught:
        await engine.probe(deadline)
    assert caught.value.kind is ErrorKind.UPSTREAM_UNAVAILABLE
