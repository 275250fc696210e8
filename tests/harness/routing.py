"""Routers over engines that do as they are told."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from helixflow.core.call import NO_HINTS, Call, Completer, Hints, Operation, Stream
from helixflow.core.clock import Clock, FakeClock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.principal import Principal, PrincipalKind
from helixflow.dialects.openai_chat import parse_chat
from helixflow.dialects.validation import decode_fields
from helixflow.routing.affinity import PrefixTable
from helixflow.routing.balancing import Balancer
from helixflow.routing.candidates import CostBound
from helixflow.routing.retry_budget import RetryBudget
from helixflow.routing.router import Router
from helixflow.routing.table import RoutingTable, build_table
from helixflow.routing.target import Target
from helixflow.settings.deployments import OpenAIDeployment
from helixflow.settings.models import ModelSettings
from helixflow.settings.serving import RoutingSettings

FAR = 1e9


def make_call(
    model: str = "m",
    *,
    prompt: str = "Hello",
    stream: bool = True,
    hints: Hints = NO_HINTS,
    call_id: str = "c" * 32,
    organisation: str = "org",
    key: str = "key_1",
    deadline: float = FAR,
    residency: str = "",
    **fields: Any,
) -> Call:
    """A chat with one message, and with what `fields` says beside."""
    content = {"model": model, "messages": [{"role": "user", "content": prompt}], **fields}
    body = msgspec.json.encode(content)
    principal = Principal(PrincipalKind.KEY, key, key, organisation, "proj", residency=residency)
    call = Call(
        call_id, "r", principal, Operation.CHAT, model, decode_fields(body), parse_chat(body), stream, False, deadline
    )
    call.body_bytes, call.hints = len(body), hints
    return call


class Answer:
    """A stream that is never read."""

    def __init__(self, deployment: str) -> None:
        self.deployment = deployment

    async def read(self) -> bytes:
        return b""

    def close(self) -> None:
        pass


@dataclass
class ScriptedEngine:
    """Answers, or fails with `error`. `calls` counts what it was asked for."""

    name: str
    error: HelixError | None = None
    calls: int = 0
    seen: list[Call] = field(default_factory=list)
    before: Callable[[Call], None] | None = None

    def fail(self, kind: ErrorKind, retry_after_s: float | None = None) -> None:
        self.error = HelixError(kind, "no", retry_after_s=retry_after_s)

    async def open(self, call: Call) -> Stream:
        self.calls += 1
        self.seen.append(call)
        if self.before is not None:
            self.before(call)
        if self.error is not None:
            raise self.error
        return Answer(self.name)


@dataclass
class Routing:
    """A router, its clock, and its engines by deployment."""

    router: Router
    clock: FakeClock
    targets: Mapping[str, Target]
    engines: Mapping[str, ScriptedEngine]

    async def served_by(self, call: Call | None = None, *, close: bool = True) -> str:
        """The deployment that answers; the stream has ended unless `close` is False."""
        stream = await self.router.open(call or make_call())
        if close:
            stream.close()
        assert call is None or call.progress.deployment
        inner: Any = stream
        return str(inner.read.__self__.deployment)

    def counts(self) -> dict[str, int]:
        return {name: engine.calls for name, engine in self.engines.items()}


def provider(name: str, **settings: Any) -> OpenAIDeployment:
    return OpenAIDeployment(engine="openai", base_url="http://localhost/v1", name=name, **settings)


def model(name: str = "m", *deployments: OpenAIDeployment, **settings: Any) -> ModelSettings:
    return ModelSettings(name=name, deployments=deployments, **settings)


def make_balancer(routing: RoutingSettings, clock: Clock, *, seed: int = 1) -> Balancer:
    return Balancer(
        PrefixTable(entries=routing.prefix_entries, block_bytes=routing.prefix_block_bytes),
        load_guard=routing.load_guard,
        monotonic=clock.monotonic,
        random_unit=random.Random(seed).random,
    )


def make_targets(
    models: Sequence[ModelSettings], engines: Mapping[str, Completer], routing: RoutingSettings, clock: Clock
) -> dict[str, Target]:
    return {
        name: Target(name, engines[name], deployment, routing=routing, clock=clock, slots=None)
        for one in models
        for name, deployment in one.named_deployments()
    }


def make_table(*models: ModelSettings) -> RoutingTable:
    names = [name for one in models for name, _ in one.named_deployments()]
    targets = make_targets(models, {name: ScriptedEngine(name) for name in names}, RoutingSettings(), FakeClock())
    return build_table(models, targets, created=7)


def make_routing(
    *models: ModelSettings, routing: RoutingSettings | None = None, cost_bound: CostBound | None = None
) -> Routing:
    routing = routing or RoutingSettings()
    clock = FakeClock()
    engines = {name: ScriptedEngine(name) for one in models for name, _ in one.named_deployments()}
    targets = make_targets(models, engines, routing, clock)
    router = Router(
        build_table(models, targets, created=7),
        balancer=make_balancer(routing, clock),
        retries=RetryBudget(routing, clock),
        clock=clock,
        cost_bound=cost_bound,
    )
    return Routing(router, clock, targets, engines)
