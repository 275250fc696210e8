"""Every kind of engine, ready to be called, for the suite that all of them must pass.

A kind is an async context manager that gives a `Subject`. To add one, write it and put it into `KINDS`.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from helixflow.core.call import Call, Completer, Operation
from helixflow.core.capacity import Replica
from helixflow.core.permissions import DEFAULT_SCOPES
from helixflow.core.principal import Principal, PrincipalKind
from helixflow.dialects.openai_chat import ChatParams, parse_chat
from helixflow.dialects.openai_completions import CompletionParams, parse_completion
from helixflow.dialects.openai_embeddings import EmbeddingParams, parse_embedding
from helixflow.dialects.validation import decode_fields
from helixflow.engines.anthropic import AnthropicEngine
from helixflow.engines.llama_cpp.engine import LlamaCppEngine
from helixflow.engines.ollama import OllamaEngine
from helixflow.engines.openai import OpenAIEngine
from helixflow.engines.vllm.engine import VllmEngine
from helixflow.transport.client import HttpClient, Timeouts
from tests.harness.engine import RunningEngine
from tests.harness.model_server import KEY, ModelServer
from tests.harness.provider_servers import AnthropicServer, OllamaServer, OpenAIServer
from tests.harness.vllm_server import VllmServer

_PRINCIPAL: Final = Principal(
    kind=PrincipalKind.KEY,
    id="key_1",
    name="one",
    organisation_id="org",
    project_id="project",
    permissions=DEFAULT_SCOPES,
)
_PARSERS: Final[Mapping[Operation, Callable[[bytes], ChatParams | CompletionParams | EmbeddingParams]]] = {
    Operation.CHAT: parse_chat,
    Operation.COMPLETIONS: parse_completion,
    Operation.EMBEDDINGS: parse_embedding,
}


@dataclass(frozen=True, slots=True)
class Subject:
    """An engine under test.

    `context` is the most tokens of a request. `become(n)` waits until its server runs so many generations. `server` is
    the scripted one behind it, None where a real engine is. What it can do: `completions`, `embeddings`,
    `forces_tools` (a call can be demanded), `keeps_connections` after a stream, `notices_absence` of a client that
    waits for a whole answer. `with_key` makes the same engine with another key, where it has one.
    """

    engine: Completer
    context: int
    become: Callable[[int], Awaitable[None]]
    client: HttpClient
    server: ModelServer | None = None
    completions: bool = True
    embeddings: bool = False
    forces_tools: bool = True
    keeps_connections: bool = True
    notices_absence: bool = True
    goes_on: bool = False
    with_key: Callable[[str], Completer] | None = None


def make_call(operation: Operation, body: dict[str, Any], *, limit_s: float = 60.0) -> Call:
    """A call as the surface makes it."""
    raw = json.dumps({"model": "m", **body}).encode()
    params = _PARSERS[operation](raw)
    options = body.get("stream_options") or {}
    return Call(
        "c0ffee00c0ffee00c0ffee00c0ffee00",
        "req-1",
        _PRINCIPAL,
        operation,
        "m",
        decode_fields(raw),
        params,
        bool(body.get("stream")),
        bool(options.get("include_usage")),
        asyncio.get_running_loop().time() + limit_s,
        len(raw),
    )


class FixedSlots:
    """Implements `Slots` over one replica that is always there."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._free = asyncio.Semaphore(replica.slots)

    async def any_replica(self, deadline: float) -> Replica:
        return self._replica

    def replicas(self) -> list[Replica]:
        return [self._replica]

    def has_alternative(self) -> bool:
        return False

    async def acquire(self, call: Call, *, avoid: Collection[str] = ()) -> "_FixedLease":
        async with asyncio.timeout_at(call.deadline):
            await self._free.acquire()
        return _FixedLease(self._replica, self._free)


class _FixedLease:
    def __init__(self, replica: Replica, free: asyncio.Semaphore) -> None:
        self.replica = replica
        self._free: asyncio.Semaphore | None = free

    def charge(self, tokens: int) -> None:
        assert tokens >= 0

    def release(self, *, failed: bool = False) -> None:
        free, self._free = self._free, None
        if free is not None:
            free.release()


_TIMEOUTS: Final = Timeouts(connect_s=60, first_byte_s=120, idle_s=120)


def provider_options(base_url: str, key: str = KEY) -> dict[str, Any]:
    """What all providers' engines are made of."""
    return {
        "deployment": "m/provider-0",
        "base_url": base_url,
        "model": "upstream",
        "api_key": key,
        "headers": {},
        "timeouts": _TIMEOUTS,
    }


@asynccontextmanager
async def _client() -> AsyncIterator[HttpClient]:
    client = HttpClient()
    try:
        yield client
    finally:
        await client.close()


def _watch(engine: RunningEngine) -> Callable[[int], Awaitable[None]]:
    async def become(running: int) -> None:
        while await asyncio.to_thread(lambda: engine.busy_slots) != running:
            await asyncio.sleep(0.02)

    return become


@asynccontextmanager
async def _llama_cpp(engine: RunningEngine) -> AsyncIterator[Subject]:
    async with _client() as client:
        slots = FixedSlots(engine.replica)
        subject = LlamaCppEngine(client, slots, deployment="m/llama_cpp-0", task="chat")
        yield Subject(subject, engine.replica.context, _watch(engine), client, keeps_connections=False)


@asynccontextmanager
async def _openai_on_llama_cpp(engine: RunningEngine) -> AsyncIterator[Subject]:
    """A real server of somebody else's, as far as the engine can tell."""
    replica = engine.replica

    def make(key: str) -> OpenAIEngine:
        return OpenAIEngine(client, **provider_options(f"http://127.0.0.1:{replica.port}/v1", key))

    async with _client() as client:
        # llama.cpp does not force a call where the template knows none, and looks for its client only when it writes.
        yield Subject(
            make(replica.api_key),
            replica.context,
            _watch(engine),
            client,
            forces_tools=False,
            notices_absence=False,
            with_key=make,
        )


@asynccontextmanager
async def _openai(_engine: RunningEngine) -> AsyncIterator[Subject]:
    def make(key: str) -> OpenAIEngine:
        return OpenAIEngine(client, **provider_options(server.base_url, key))

    async with OpenAIServer() as server, _client() as client:
        yield Subject(make(KEY), server.context, server.become, client, server, embeddings=True, with_key=make)


@asynccontextmanager
async def _anthropic(_engine: RunningEngine) -> AsyncIterator[Subject]:
    def make(key: str) -> AnthropicEngine:
        return AnthropicEngine(client, version="2023-06-01", max_tokens=64, **provider_options(server.base_url, key))

    async with AnthropicServer() as server, _client() as client:
        yield Subject(make(KEY), server.context, server.become, client, server, completions=False, with_key=make)


@asynccontextmanager
async def _ollama(_engine: RunningEngine) -> AsyncIterator[Subject]:
    def make(key: str) -> OllamaEngine:
        return OllamaEngine(client, context=512, **provider_options(server.base_url, key))

    async with OllamaServer() as server, _client() as client:
        yield Subject(
            make(KEY), server.context, server.become, client, server, embeddings=True, forces_tools=False, with_key=make
        )


def replica_of(server: ModelServer, name: str = "m/vllm-0#0") -> Replica:
    """A scripted server as a replica."""
    port = int(server.base_url.split(":")[2].partition("/")[0])
    return Replica(name, "127.0.0.1", port, KEY, slots=4, context=server.context, supports_tools=True)


@asynccontextmanager
async def _vllm(_engine: RunningEngine) -> AsyncIterator[Subject]:
    async with VllmServer() as server, _client() as client:
        slots = FixedSlots(replica_of(server))
        engine = VllmEngine(client, slots, deployment="m/vllm-0", public_model="m", task="chat")
        yield Subject(engine, server.context, server.become, client, server, goes_on=True)


Kind = Callable[[RunningEngine], AbstractAsyncContextManager[Subject]]
KINDS: Final[Mapping[str, Kind]] = {
    "llama_cpp": _llama_cpp,
    "openai_on_llama_cpp": _openai_on_llama_cpp,
    "openai": _openai,
    "anthropic": _anthropic,
    "ollama": _ollama,
    "vllm": _vllm,
}
