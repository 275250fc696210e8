import asyncio
import contextlib
import io
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from helixflow.auth.service import SERVICE_NAME, AuthServices, create_auth
from helixflow.clients.auth import KeyAdmin, KeyResolver
from helixflow.core.clock import SystemClock
from helixflow.core.errors import ErrorKind, ExitCode, HelixError, UserError
from helixflow.core.keys import generate_key, hash_key, is_well_formed
from helixflow.rpc.channels import create_channel
from helixflow.rpc.errors import INTERNAL_TEXT
from helixflow.rpc.servers import add_health_and_reflection, create_server, listen
from helixflow.rpc.sockets import prepare_run_dir, socket_path
from helixflow.settings.tree import Settings
from helixflow.telemetry.logs import configure_logging


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path)


@asynccontextmanager
async def auth_running(settings: Settings, bootstrap_env: str | None = None) -> AsyncIterator[AuthServices]:
    prepare_run_dir(settings.run_dir)
    services = await create_auth(settings, bootstrap_env)
    server = create_server()
    try:
        services.register(server)
        await add_health_and_reflection(server, [SERVICE_NAME])
        await listen(server, socket_path(settings.run_dir, "auth"))
        await server.start()
        yield services
    finally:
        await services.close()
        await server.stop(1)


@asynccontextmanager
async def channel_to(settings: Settings) -> AsyncIterator[grpc.aio.Channel]:
    async with create_channel(socket_path(settings.run_dir, "auth")) as channel:
        yield channel


@asynccontextmanager
async def watching(channel: grpc.aio.Channel) -> AsyncIterator[KeyResolver]:
    resolver = KeyResolver(channel, size=1000, ttl_s=60, grace_s=300, clock=SystemClock())
    task = asyncio.create_task(resolver.run())
    try:
        yield resolver
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until(condition: Callable[[], bool], within_s: float) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


async def fails(attempt: Awaitable[object]) -> HelixError:
    with pytest.raises(HelixError) as caught:
        await attempt
    return caught.value


async def test_a_key_is_created_resolved_and_its_revocation_pushed_within_a_second(settings: Settings) -> None:
    async with auth_running(settings), channel_to(settings) as channel, watching(channel) as resolver:
        await until(lambda: resolver._watching, 5)
        admin = KeyAdmin(channel)
        info, secret = await admin.create("build robot")
        assert is_well_formed(secret)
        principal = await resolver.resolve(hash_key(secret))
        assert (principal.key_id, principal.key_name) == (info.key_id, "build robot")
        assert resolver.cached(hash_key(secret)) == principal

        revoked = await admin.revoke(info.key_id)
        assert revoked.revoked_at > 0
        await until(lambda: resolver.cached(hash_key(secret)) is None, 1)
        assert (await fails(resolver.resolve(hash_key(secret)))).kind is ErrorKind.INVALID_API_KEY
        assert (await admin.revoke(info.key_id)).revoked_at == revoked.revoked_at
        assert (await fails(admin.revoke("key_none"))).kind is ErrorKind.NOT_FOUND


async def test_keys_are_listed_newest_first_without_secrets(settings: Settings) -> None:
    async with auth_running(settings) as services, channel_to(settings) as channel:
        admin = KeyAdmin(channel)
        _, secret = await admin.create("one", 4_000_000_000)
        keys = await admin.list_keys()
        assert {key.name: key.bootstrap for key in keys} == {"one": False, "bootstrap": True}
        one = next(key for key in keys if key.name == "one")
        assert one.expires_at == 4_000_000_000
        assert one.hint.startswith(secret[:8])
        assert secret not in repr(keys)
        assert services.bootstrap_key not in repr(keys)


async def test_without_auth_a_cached_key_works_and_an_unknown_one_is_unavailable(settings: Settings) -> None:
    async with contextlib.AsyncExitStack() as stack:
        channel = await stack.enter_async_context(channel_to(settings))
        resolver = await stack.enter_async_context(watching(channel))
        async with auth_running(settings) as services:
            await until(lambda: resolver._watching, 5)
            known = hash_key(services.bootstrap_key)
            await resolver.resolve(known)
        await until(lambda: not resolver._watching, 5)
        assert resolver.cached(known) is not None
        unknown = await fails(resolver.resolve(hash_key(generate_key())))
        assert (unknown.kind, unknown.traits.http) == (ErrorKind.UNAVAILABLE, 503)
        resolver._entries[known].fresh_until = 0
        assert (await resolver.resolve(known)).key_name == "bootstrap"


async def test_a_revocation_during_a_restart_of_auth_is_noticed(settings: Settings) -> None:
    async with channel_to(settings) as channel, watching(channel) as resolver:
        async with auth_running(settings) as services:
            await until(lambda: resolver._watching, 5)
            info, secret = await KeyAdmin(channel).create("short-lived")
            kept = hash_key(services.bootstrap_key)
            await resolver.resolve(hash_key(secret))
            await resolver.resolve(kept)
        await until(lambda: not resolver._watching, 5)
        # The resolver's stream is away while another process revokes.
        restarted = await create_auth(settings, None)
        await restarted._service._revoke(info.key_id)
        await restarted.close()
        async with auth_running(settings):
            await until(lambda: resolver._watching, 10)
            assert resolver.cached(hash_key(secret)) is None
            assert (await fails(resolver.resolve(hash_key(secret)))).kind is ErrorKind.INVALID_API_KEY
            assert (await resolver.resolve(kept)).key_name == "bootstrap"


async def test_a_restart_without_revocations_keeps_the_cache(settings: Settings) -> None:
    async with channel_to(settings) as channel, watching(channel) as resolver:
        async with auth_running(settings) as services:
            await until(lambda: resolver._watching, 5)
            known = hash_key(services.bootstrap_key)
            principal = await resolver.resolve(known)
        await until(lambda: not resolver._watching, 5)
        async with auth_running(settings):
            await until(lambda: resolver._watching, 10)
            assert resolver.cached(known) is principal


async def test_the_bootstrap_key_is_made_once_kept_private_and_valid(settings: Settings) -> None:
    async with auth_running(settings) as services:
        first = services.bootstrap_key
    path = settings.data_dir / "bootstrap.key"
    assert path.read_text().strip() == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((settings.data_dir / "helixflow.db").stat().st_mode) == 0o600
    async with auth_running(settings) as services, channel_to(settings) as channel:
        assert services.bootstrap_key == first
        resolver = KeyResolver(channel, size=10, ttl_s=60, grace_s=300, clock=SystemClock())
        assert (await resolver.resolve(hash_key(first))).key_name == "bootstrap"
    assert [file.name for file in settings.data_dir.iterdir() if file.name.startswith(".bootstrap")] == []


async def test_starts_at_the_same_time_end_with_one_key(settings: Settings) -> None:
    started = await asyncio.gather(*(create_auth(settings, None) for _ in range(4)))
    assert len({services.bootstrap_key for services in started}) == 1
    for services in started:
        await services.close()


async def test_a_changed_key_from_the_environment_revokes_the_one_before(settings: Settings) -> None:
    a, b = generate_key(), generate_key()
    for env, valid, dead in ((a, a, b), (b, b, a), (a, a, b)):
        async with auth_running(settings, env) as services, channel_to(settings) as channel:
            assert services.bootstrap_key == env
            resolver = KeyResolver(channel, size=10, ttl_s=60, grace_s=300, clock=SystemClock())
            assert (await resolver.resolve(hash_key(valid))).key_name == "bootstrap"
            assert (await fails(resolver.resolve(hash_key(dead)))).kind is ErrorKind.INVALID_API_KEY
    assert not (settings.data_dir / "bootstrap.key").exists()


async def test_a_bootstrap_key_revoked_by_hand_stays_dead(settings: Settings) -> None:
    async with auth_running(settings) as services, channel_to(settings) as channel:
        first = services.bootstrap_key
        admin = KeyAdmin(channel)
        await admin.revoke((await admin.list_keys())[0].key_id)
    async with auth_running(settings) as services:
        assert services.bootstrap_key != first
    with pytest.raises(UserError, match="was revoked") as caught:
        await create_auth(settings, first)
    assert caught.value.exit_code is ExitCode.CONFIG


async def test_a_malformed_bootstrap_key_stops_the_start_and_is_not_repeated(settings: Settings) -> None:
    bad = generate_key()[:-1] + "!"
    with pytest.raises(UserError, match="HELIXFLOW_BOOTSTRAP_API_KEY") as caught:
        await create_auth(settings, bad)
    assert caught.value.exit_code is ExitCode.CONFIG
    assert bad not in caught.value.message
    (settings.data_dir / "bootstrap.key").write_text(bad)
    with pytest.raises(UserError, match=r"bootstrap\.key") as caught:
        await create_auth(settings, None)
    assert bad not in caught.value.message


async def test_a_second_server_on_the_same_socket_is_refused_and_a_stale_file_is_not(settings: Settings) -> None:
    path = socket_path(settings.run_dir, "auth")
    async with auth_running(settings), channel_to(settings) as channel:
        with pytest.raises(UserError, match="already") as caught:
            await listen(create_server(), path)
        assert caught.value.exit_code is ExitCode.PORT_BUSY
        assert await KeyAdmin(channel).list_keys()
    import socket

    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    assert path.exists()
    async with auth_running(settings), channel_to(settings) as channel:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert await KeyAdmin(channel).list_keys()


async def test_a_crash_in_the_service_is_internal_with_fixed_text_and_no_secret_is_logged(settings: Settings) -> None:
    written = io.StringIO()
    configure_logging("debug", "json", service="test", stream=written)
    async with auth_running(settings) as services, channel_to(settings) as channel:
        admin = KeyAdmin(channel)
        secrets = [services.bootstrap_key, (await admin.create("one"))[1]]

        async def crash(name: str, expires_at: int = 0) -> None:
            secret = generate_key()
            secrets.append(secret)
            raise ZeroDivisionError("a bug")

        services._service._directory.create = crash  # type: ignore[assignment, method-assign]
        error = await fails(admin.create("two"))
        assert (error.kind, error.message) == (ErrorKind.INTERNAL, INTERNAL_TEXT)
    log = written.getvalue()
    structlog.reset_defaults()
    assert "rpc.crashed" in log
    assert "ZeroDivisionError" in log
    for secret in secrets:
        assert secret not in log
        assert secret[8:40] not in log
        assert hash_key(secret).hex() not in log


async def test_health_and_bad_requests(settings: Settings) -> None:
    async with auth_running(settings), channel_to(settings) as channel:
        request = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
        answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        resolver = KeyResolver(channel, size=10, ttl_s=60, grace_s=300, clock=SystemClock())
        assert (await fails(resolver.resolve(b"short"))).kind is ErrorKind.UNAVAILABLE
        expired = await fails(KeyAdmin(channel).create("late", 1))
        assert (expired.kind, expired.param) == (ErrorKind.INVALID_VALUE, "expires_at")


async def test_no_service_is_unavailable_at_once(settings: Settings) -> None:
    async with asyncio.timeout(3), channel_to(settings) as channel:
        assert (await fails(KeyAdmin(channel).list_keys())).kind is ErrorKind.UNAVAILABLE
