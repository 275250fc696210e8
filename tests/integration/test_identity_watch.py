"""The watch on changes over real gRPC: what is kept, what is forgotten, and what is begun anew."""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from helixflow.clients import changes
from helixflow.clients.changes import ChangeWatch
from helixflow.clients.keys import KeyResolver
from helixflow.clients.tokens import TokenVerifier
from helixflow.core.clock import SystemClock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.channels import create_channel
from helixflow.rpc.generated.auth_v1 import identity_pb2 as pb
from helixflow.rpc.generated.auth_v1 import identity_pb2_grpc
from helixflow.rpc.servers import create_server, listen
from helixflow.rpc.sockets import prepare_run_dir, socket_path
from tests.harness.node import eventually
from tests.harness.pki import Pki, allow
from tests.harness.tokens import TokenMint, change, snapshot

KEY = b"k" * 32
IDENTITY = "helixflow.auth.v1.IdentityService"


class ScriptedIdentity(identity_pb2_grpc.IdentityServiceServicer):
    """Begins each watch with `snapshot`, then sends what the test puts in; an exception put in is raised."""

    def __init__(self, first: pb.WatchChangesResponse) -> None:
        self.snapshot = first
        self.script: asyncio.Queue[pb.WatchChangesResponse | Exception] = asyncio.Queue()
        self.watches = 0
        self.failure: HelixError | None = None
        self.asked: list[bytes] = []

    async def ResolveKey(self, request: Any, context: Any) -> pb.ResolveKeyResponse:
        self.asked.append(request.key_hash)
        if self.failure is not None:
            raise self.failure
        if request.key_hash != KEY:
            raise HelixError(ErrorKind.NOT_FOUND, "There is no such key.")
        return pb.ResolveKeyResponse(key_id="key_1", project_id="proj_1", permissions=["models:use"])

    async def WatchChanges(self, request: Any, context: Any) -> AsyncIterator[pb.WatchChangesResponse]:
        self.watches += 1
        yield self.snapshot
        while True:
            step = await self.script.get()
            if isinstance(step, Exception):
                raise step
            yield step


class Bench:
    def __init__(self, channel: grpc.aio.Channel, service: ScriptedIdentity, mint: TokenMint) -> None:
        clock = SystemClock()
        self.service = service
        self.mint = mint
        self.watch = ChangeWatch(channel, clock=clock)
        self.keys = KeyResolver(channel, self.watch, size=100, ttl_s=60, grace_s=300, clock=clock)
        self.tokens = TokenVerifier(self.watch, size=100, grace_s=300, clock=clock)

    async def stands(self, watches: int = 1) -> None:
        await eventually(lambda: self.service.watches >= watches and self.watch._standing)

    def accepts(self, token: bytes) -> bool:
        try:
            return bool(self.tokens.verify(token).id)
        except HelixError:
            return False


@pytest.fixture
async def bench(pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    prepare_run_dir(tmp_path / "run")
    path = socket_path(tmp_path / "run", "control")
    mint = TokenMint()
    service = ScriptedIdentity(snapshot(10, [mint.public]))
    identity = pki.identity("control")
    server = create_server(identity, allow(IDENTITY))
    identity_pb2_grpc.add_IdentityServiceServicer_to_server(service, server)
    await listen(server, path, identity)
    await server.start()
    channel = create_channel(path, pki.identity("gateway"), "control")
    bench = Bench(channel, service, mint)
    monkeypatch.setattr(changes, "PROBE_S", 0.02)
    monkeypatch.setattr(changes, "DOUBT_PROBE_S", 0.02)
    async with _running(bench):
        yield bench
    await channel.close()
    await server.stop(0)


@asynccontextmanager
async def _running(bench: Bench) -> AsyncIterator[None]:
    running = asyncio.create_task(bench.watch.run())
    try:
        yield
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        await bench.keys.close()


async def test_a_change_reaches_keys_and_tokens(bench: Bench) -> None:
    await bench.stands()
    token = bench.mint.token()
    assert bench.accepts(token)
    await bench.keys.resolve(KEY)
    bench.service.script.put_nowait(change(11, pb.CHANGE_KIND_PROJECT, "proj_1"))
    await eventually(lambda: bench.keys.cached(KEY) is None)
    assert not bench.accepts(token)
    assert bench.accepts(bench.mint.token(rev=11))


async def test_a_gap_forgets_and_begins_anew(bench: Bench) -> None:
    await bench.stands()
    await bench.keys.resolve(KEY)
    bench.service.snapshot = snapshot(
        15, [bench.mint.public], [pb.Change(kind=pb.CHANGE_KIND_SESSION, subject_id="ses_1", revision=12)]
    )
    bench.service.script.put_nowait(change(15, pb.CHANGE_KIND_KEY, key_hash=b"x" * 32))
    await bench.stands(watches=2)
    assert bench.keys.cached(KEY) is None
    assert not bench.accepts(bench.mint.token())
    assert bench.accepts(bench.mint.token(sid="ses_2"))


async def test_a_break_without_changes_keeps_what_is_known(bench: Bench) -> None:
    await bench.stands()
    await bench.keys.resolve(KEY)
    principal = bench.tokens.verify(bench.mint.token())
    bench.service.script.put_nowait(HelixError(ErrorKind.UNAVAILABLE, "The database cannot be read now."))
    await bench.stands(watches=2)
    assert bench.keys.cached(KEY) is not None
    assert bench.tokens.verify(bench.mint.token()) is principal


async def test_a_service_that_stops_answering_is_noticed_and_believed_again(bench: Bench) -> None:
    """With nobody asking for keys: tokens alone need no answer from it."""
    await bench.stands()
    bench.service.failure = HelixError(ErrorKind.INTERNAL, "Internal error.")
    await eventually(lambda: bench.watch.vouched_until < math.inf)
    assert bench.accepts(bench.mint.token())
    bench.service.failure = None
    await eventually(lambda: bench.watch.vouched_until == math.inf)
    assert set(bench.service.asked) == {bytes(32)}
