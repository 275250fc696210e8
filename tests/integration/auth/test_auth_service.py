"""The whole service behind real gRPC with mutual TLS: what gateways ask and are told, and what the admin API calls."""

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
import structlog
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sqlalchemy import select

from helixflow.auth.organisations import DEFAULT_ORGANISATION_ID
from helixflow.auth.projects import DEFAULT_PROJECT_ID
from helixflow.auth.service import AuthServices, create_auth
from helixflow.clients.changes import ChangeWatch
from helixflow.clients.keys import KeyResolver
from helixflow.core.clock import SystemClock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.keys import generate_key, hash_key
from helixflow.core.permissions import Permission
from helixflow.metering.policies import Scope
from helixflow.metering.policy_cache import PolicyCache
from helixflow.rpc.access import AUTHORIZATION, IDEMPOTENCY_KEY
from helixflow.rpc.channels import create_channel
from helixflow.rpc.errors import INTERNAL_TEXT, from_rpc_error
from helixflow.rpc.generated.auth_v1 import admin_pb2 as pb
from helixflow.rpc.generated.auth_v1 import (
    admin_pb2_grpc,
    identity_pb2,
    identity_pb2_grpc,
    metering_pb2,
    usage_pb2,
    usage_pb2_grpc,
)
from helixflow.rpc.servers import add_health_and_reflection, create_server, listen
from helixflow.rpc.sockets import prepare_run_dir, socket_path
from helixflow.settings.tree import Settings
from helixflow.storage.schema import api_keys, audit_records
from helixflow.telemetry.logs import configure_logging
from tests.harness.pki import Pki, allow
from tests.harness.postgres import PostgresServer

# Promised is a second; the machine may have other work. Without being told, a gateway would notice after a minute.
TOLD_S = 20.0


class Admin:
    """Calls AdminService as the console does, with an API key."""

    def __init__(self, channel: grpc.aio.Channel, key: str) -> None:
        self._stub = admin_pb2_grpc.AdminServiceStub(channel)
        self._key = key

    async def call(self, rpc: str, request: Message, **metadata: str) -> object:
        sent = ((AUTHORIZATION, f"Bearer {self._key}"), *metadata.items())
        try:
            return await getattr(self._stub, rpc)(request, metadata=sent, timeout=60)
        except grpc.RpcError as exc:
            raise from_rpc_error(exc) from exc

    async def create(self, name: str, idempotency_key: str = "", **fields: object) -> pb.CreateKeyResponse:
        request = pb.CreateKeyRequest(name=name, **fields)  # type: ignore[arg-type]
        metadata = {IDEMPOTENCY_KEY: idempotency_key} if idempotency_key else {}
        answer = await self.call("CreateKey", request, **metadata)
        assert isinstance(answer, pb.CreateKeyResponse)
        return answer


@asynccontextmanager
async def serving(settings: Settings, pki: Pki) -> AsyncIterator[AuthServices]:
    prepare_run_dir(settings.run_dir)
    services = await create_auth(settings, None)
    identity = pki.identity("control")
    server = create_server(identity, allow(*services.names))
    running = asyncio.create_task(services.run())
    try:
        services.register(server)
        await add_health_and_reflection(server, services.names)
        await listen(server, socket_path(settings.run_dir, "control"), identity)
        await server.start()
        yield services
    finally:
        running.cancel()
        await asyncio.wait((running,))
        await services.close()
        await server.stop(1)


@asynccontextmanager
async def channel_to(settings: Settings, pki: Pki, service: str = "gateway") -> AsyncIterator[grpc.aio.Channel]:
    socket = socket_path(settings.run_dir, "control")
    async with create_channel(socket, pki.identity(service), "control") as channel:
        yield channel


@asynccontextmanager
async def watching(channel: grpc.aio.Channel) -> AsyncIterator[tuple[KeyResolver, ChangeWatch]]:
    watch = ChangeWatch(channel, clock=SystemClock())
    resolver = KeyResolver(channel, watch, size=1000, ttl_s=60, grace_s=300, clock=SystemClock())
    task = asyncio.create_task(watch.run())
    try:
        await until(lambda: watch._standing, TOLD_S)
        yield resolver, watch
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await resolver.close()


async def until(condition: Callable[[], bool], within_s: float) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


async def fails(attempt: Awaitable[object]) -> HelixError:
    with pytest.raises(HelixError) as caught:
        await attempt
    return caught.value


async def test_a_limit_is_pushed_to_gateways_within_a_second_and_keys_stay_known(
    database_settings: Settings, pki: Pki
) -> None:
    async with (
        serving(database_settings, pki) as services,
        channel_to(database_settings, pki) as channel,
        watching(channel) as (resolver, watch),
    ):
        cache = PolicyCache(channel, watch, size=100, grace_s=300, clock=SystemClock())
        key_hash = hash_key(services.bootstrap_key)
        principal = await resolver.resolve(key_hash)
        assert not await cache.resolve(principal, "m")
        usage = usage_pb2_grpc.UsageServiceStub(channel)
        metadata = ((AUTHORIZATION, f"Bearer {services.bootstrap_key}"),)
        limit = usage_pb2.CreateLimitRequest(
            scope=metering_pb2.SCOPE_INSTALLATION,
            metric=metering_pb2.METRIC_PARALLEL_REQUESTS,
            model="m",
            value=3,
            imposed=True,
        )
        budget = usage_pb2.CreateBudgetRequest(
            scope=metering_pb2.SCOPE_KEY,
            subject_id=principal.id,
            unit=metering_pb2.BUDGET_UNIT_MONEY,
            period=metering_pb2.BUDGET_PERIOD_DAY,
            cap="0.5",
        )
        made = await usage.CreateLimit(limit, metadata=metadata, timeout=60)
        await until(lambda: cache.cached(principal, "m") is None, TOLD_S)
        found = await cache.resolve(principal, "m")
        assert [(limit.id, limit.scope, limit.value) for limit in found.limits] == [(made.id, Scope.INSTALLATION, 3)]
        assert not await cache.resolve(principal, "another")
        await usage.CreateBudget(budget, metadata=metadata, timeout=60)
        await until(lambda: cache.cached(principal, "m") is None, TOLD_S)
        (spendable,) = (await cache.resolve(principal, "m")).budgets
        assert (spendable.subject_id, spendable.cap) == (principal.id, 500_000_000)
        assert resolver.cached(key_hash) is principal
        await cache.close()


async def test_a_key_is_made_resolved_and_every_change_of_it_pushed_within_a_second(
    database_settings: Settings, pki: Pki
) -> None:
    async with (
        serving(database_settings, pki) as services,
        channel_to(database_settings, pki) as channel,
        watching(channel) as (resolver, watch),
    ):
        admin = Admin(channel, services.bootstrap_key)
        made = await admin.create("build robot", models=["smollm2"], networks=["10.0.0.0/8"], scopes=["models:use"])
        key_hash = hash_key(made.secret)
        principal = await resolver.resolve(key_hash)
        assert (principal.id, principal.name) == (made.key.id, "build robot")
        assert (principal.organisation_id, principal.project_id) == (DEFAULT_ORGANISATION_ID, DEFAULT_PROJECT_ID)
        assert (principal.permissions, principal.models) == ({Permission.MODELS_USE}, {"smollm2"})
        assert [str(network) for network in principal.networks or ()] == ["10.0.0.0/8"]

        request = pb.UpdateKeyRequest(id=made.key.id, scopes=pb.StringList(values=["models:read"]))
        await admin.call("UpdateKey", request)
        await until(lambda: resolver.cached(key_hash) is None, TOLD_S)
        assert (await resolver.resolve(key_hash)).permissions == {Permission.MODELS_READ}

        rotated = await admin.call("RotateKey", pb.RotateKeyRequest(id=made.key.id))
        assert isinstance(rotated, pb.CreateKeyResponse)
        await until(lambda: resolver.cached(key_hash) is None, TOLD_S)
        assert (await fails(resolver.resolve(key_hash))).kind is ErrorKind.INVALID_API_KEY
        successor = hash_key(rotated.secret)
        assert (await resolver.resolve(successor)).id == rotated.key.id

        await admin.call("RevokeKey", pb.ChangeRequest(id=rotated.key.id))
        await until(lambda: resolver.cached(successor) is None, TOLD_S)
        assert (await fails(resolver.resolve(successor))).kind is ErrorKind.INVALID_API_KEY

        # The first signing key is made after the start, and comes along.
        await until(lambda: len(watch.signing_keys) == 1, 60)
        assert (watch.issuer, watch.audience) == ("helixflow", "helixflow")
        assert len(watch.signing_keys[0].modulus) == 512


async def test_a_service_accounts_key_stops_with_its_account(database_settings: Settings, pki: Pki) -> None:
    async with (
        serving(database_settings, pki) as services,
        channel_to(database_settings, pki) as channel,
        watching(channel) as (resolver, _),
    ):
        admin = Admin(channel, services.bootstrap_key)
        account = await admin.call("CreateServiceAccount", pb.CreateServiceAccountRequest(name="r", role="developer"))
        assert isinstance(account, pb.ServiceAccount)
        made = await admin.create("of the robot", owner_id=account.id, scopes=["models:use", "keys:read"])
        key_hash = hash_key(made.secret)
        assert (await resolver.resolve(key_hash)).owner_id == account.id
        for change, left in (
            ({"role": "viewer"}, {Permission.KEYS_READ}),
            ({"suspended": True}, None),
            ({"suspended": False}, {Permission.KEYS_READ}),
        ):
            await admin.call("UpdateServiceAccount", pb.UpdateServiceAccountRequest(id=account.id, **change))  # type: ignore[arg-type]
            await until(lambda: resolver.cached(key_hash) is None, TOLD_S)
            if left is None:
                assert (await fails(resolver.resolve(key_hash))).kind is ErrorKind.INVALID_API_KEY
                resolver._unknown.clear()
            else:
                assert (await resolver.resolve(key_hash)).permissions == left


async def test_the_bootstrap_key_is_an_owner_and_an_operator(tmp_path: Path, pki: Pki) -> None:
    settings = Settings(data_dir=tmp_path)
    async with (
        serving(settings, pki) as services,
        channel_to(settings, pki) as channel,
        watching(channel) as (resolver, _),
    ):
        principal = await resolver.resolve(hash_key(services.bootstrap_key))
        assert principal.permissions == frozenset(Permission)
        admin = Admin(channel, services.bootstrap_key)
        organisations = await admin.call("ListOrganisations", pb.ListRequest())
        assert [one.id for one in organisations.organisations] == [DEFAULT_ORGANISATION_ID]  # type: ignore[attr-defined]
        keys = await admin.call("ListKeys", pb.ListInProjectRequest())
        assert services.bootstrap_key not in repr(keys)


async def test_a_change_during_a_restart_is_noticed_and_without_one_the_cache_is_kept(
    database_settings: Settings, pki: Pki
) -> None:
    async with channel_to(database_settings, pki) as channel, contextlib.AsyncExitStack() as stack:
        async with serving(database_settings, pki) as services:
            resolver, watch = await stack.enter_async_context(watching(channel))
            key = services.bootstrap_key
            made = await Admin(channel, key).create("short-lived")
            known, doomed = hash_key(key), hash_key(made.secret)
            # The first signing key is a change, too.
            await until(lambda: len(watch.signing_keys) == 1, 60)
            kept = await resolver.resolve(known)
            await resolver.resolve(doomed)
        await until(lambda: not watch._standing, TOLD_S)
        assert resolver.cached(doomed) is not None
        assert (await fails(resolver.resolve(hash_key(generate_key())))).kind is ErrorKind.UNAVAILABLE
        async with serving(database_settings, pki):
            await until(lambda: watch._standing, TOLD_S)
            assert resolver.cached(known) is kept
        await until(lambda: not watch._standing, TOLD_S)
        # The gateway's stream is away while another process revokes.
        async with serving(database_settings, pki) as services:
            async with services.units._database.writing() as connection:
                await connection.execute(api_keys.update().where(api_keys.c.id == made.key.id).values(revoked_at=1))
                await connection.exec_driver_sql("UPDATE installation SET number = number + 1 WHERE name = 'revision'")
            await until(lambda: watch._standing, TOLD_S)
            await until(lambda: resolver.cached(doomed) is None, TOLD_S)
            assert (await fails(resolver.resolve(doomed))).kind is ErrorKind.INVALID_API_KEY
            assert (await resolver.resolve(known)).name == "bootstrap"


async def test_two_processes_on_one_postgresql_tell_each_others_gateways(
    postgres_server: PostgresServer, tmp_path: Path, pki: Pki
) -> None:
    with postgres_server.database() as url:
        database = postgres_server.settings(url, tmp_path)
        first, second = (Settings(data_dir=tmp_path / name, database=database) for name in ("first", "second"))
        async with serving(first, pki) as services:
            second.data_dir.mkdir(mode=0o700)
            for name in ("master.key", "bootstrap.key"):
                (second.data_dir / name).write_bytes((first.data_dir / name).read_bytes())
                (second.data_dir / name).chmod(0o600)
            async with (
                serving(second, pki) as others,
                channel_to(first, pki) as channel,
                channel_to(second, pki) as other_channel,
                watching(other_channel) as (resolver, _),
            ):
                assert others.bootstrap_key == services.bootstrap_key
                admin = Admin(channel, services.bootstrap_key)
                made = await admin.create("one")
                await resolver.resolve(hash_key(made.secret))
                await admin.call("RevokeKey", pb.ChangeRequest(id=made.key.id))
                await until(lambda: resolver.cached(hash_key(made.secret)) is None, TOLD_S)


async def test_bad_requests_and_callers(database_settings: Settings, pki: Pki) -> None:
    async with serving(database_settings, pki) as services, channel_to(database_settings, pki) as channel:
        identity = identity_pb2_grpc.IdentityServiceStub(channel)
        for key_hash, kind in (
            (b"short", ErrorKind.INVALID_VALUE),
            (bytes(33), ErrorKind.INVALID_VALUE),
            (bytes(32), ErrorKind.NOT_FOUND),
            (b"%" * 32, ErrorKind.NOT_FOUND),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                await identity.ResolveKey(identity_pb2.ResolveKeyRequest(key_hash=key_hash), timeout=60)
            assert from_rpc_error(caught.value).kind is kind
        for service in services.names:
            question = health_pb2.HealthCheckRequest(service=service)
            answer = await health_pb2_grpc.HealthStub(channel).Check(question, timeout=60)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        nobody = Admin(channel, "")
        assert (await fails(nobody.create("x"))).kind is ErrorKind.INVALID_TOKEN
        for key in (generate_key(), "hfk_", services.bootstrap_key[:-1], "a.b.c"):
            kind = (await fails(Admin(channel, key).create("x"))).kind
            assert kind in (ErrorKind.INVALID_API_KEY, ErrorKind.INVALID_TOKEN)
        admin = Admin(channel, services.bootstrap_key)
        for rpc, request in (("GetKey", pb.GetRequest(id="\0")), ("CreateKey", pb.CreateKeyRequest(models=["\0"]))):
            assert (await fails(admin.call(rpc, request))).kind is ErrorKind.UNPROCESSABLE


async def test_refusals_are_recorded_within_a_second_and_before_the_end(database_settings: Settings, pki: Pki) -> None:
    async def recorded(services: AuthServices) -> set[str]:
        query = select(audit_records.c.target_id).where(audit_records.c.outcome == "denied")
        return {row.target_id for row in await services.units._database.fetch_all(query)}

    async with serving(database_settings, pki) as services, channel_to(database_settings, pki) as channel:
        admin = Admin(channel, services.bootstrap_key)
        assert (await fails(admin.call("GetKey", pb.GetRequest(id="key_1")))).kind is ErrorKind.NOT_FOUND
        async with asyncio.timeout(TOLD_S):
            while "key_1" not in await recorded(services):
                await asyncio.sleep(0.05)
        assert (await fails(admin.call("GetKey", pb.GetRequest(id="key_2")))).kind is ErrorKind.NOT_FOUND
    async with serving(database_settings, pki) as services:
        assert await recorded(services) == {"key_1", "key_2"}


async def test_a_client_that_hangs_up_does_not_undo_what_it_began(database_settings: Settings, pki: Pki) -> None:
    async with (
        serving(database_settings, pki) as services,
        channel_to(database_settings, pki) as channel,
        watching(channel) as (resolver, _),
    ):
        admin = Admin(channel, services.bootstrap_key)
        made = await admin.create("one", idempotency_key="first")
        await resolver.resolve(hash_key(made.secret))
        async with services.units._database.writing():
            call = asyncio.create_task(admin.call("RevokeKey", pb.ChangeRequest(id=made.key.id)))
            await until(lambda: bool(services._dispatcher._writes), TOLD_S)
            call.cancel()
            await asyncio.wait((call,))
        await until(lambda: resolver.cached(hash_key(made.secret)) is None, TOLD_S)
        assert (await admin.create("one", idempotency_key="first")).secret == made.secret


async def test_a_crash_is_internal_with_fixed_text_and_no_secret_is_logged(
    tmp_path: Path, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(data_dir=tmp_path)
    written = io.StringIO()
    configure_logging("debug", "json", service="test", stream=written)
    try:
        async with serving(settings, pki) as services, channel_to(settings, pki) as channel:
            admin = Admin(channel, services.bootstrap_key)
            secrets = [services.bootstrap_key, (await admin.create("one")).secret]

            def crash() -> str:
                secrets.append(generate_key())
                raise ZeroDivisionError("a bug")

            monkeypatch.setattr("helixflow.auth.keys.generate_key", crash)
            error = await fails(admin.create("two"))
            assert (error.kind, error.message) == (ErrorKind.INTERNAL, INTERNAL_TEXT)
    finally:
        structlog.reset_defaults()
    log = written.getvalue()
    assert "rpc.crashed" in log
    assert "ZeroDivisionError" in log
    for secret in secrets:
        assert secret not in log
        assert secret[8:40] not in log
        assert hash_key(secret).hex() not in log
