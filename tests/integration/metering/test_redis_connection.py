"""The connection to a real Redis: how it is made, what goes wrong with it."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from helixflow.core.errors import UserError
from helixflow.metering.redis.connection import Lost, RedisConnection
from helixflow.metering.redis.link import RedisLink, RedisUnavailable
from helixflow.metering.redis.resp import Reply, encode_arguments
from helixflow.pki.names import HTTPS
from helixflow.settings.tree import RedisSettings
from tests.harness.pki import Pki
from tests.harness.redis import RedisServer


@pytest.fixture
def server(redis_server: RedisServer) -> Iterator[RedisServer]:
    redis_server.start()
    yield redis_server
    redis_server.start()
    redis_server.resume()


class Losses(list[str]):
    """Why connections were lost."""


async def connect(settings: RedisSettings, losses: Losses | None = None) -> tuple[RedisConnection, RedisLink]:
    link = RedisLink(settings, "helixflow-test")
    connection, _ = await link.connect(ignore, (losses if losses is not None else Losses()).append)
    return connection, link


async def test_commands_of_one_turn_are_answered_in_their_order(server: RedisServer) -> None:
    connection, _ = await connect(server.settings())
    answers = [connection.command(b"ECHO", b"%d" % number) for number in range(1000)]
    assert [await answer for answer in answers] == [b"%d" % number for number in range(1000)]
    connection.close()


async def test_by_a_socket_and_another_database(server: RedisServer) -> None:
    over_tcp, _ = await connect(server.settings(url=f"redis://127.0.0.1:{server.port}/3"))
    await over_tcp.command(b"SET", b"x", b"1")
    over_socket, _ = await connect(server.settings(url=f"unix://{server.socket_path}"))
    assert await over_socket.command(b"GET", b"x") is None
    assert await over_socket.command(b"CLIENT", b"GETNAME") == b"helixflow-test"
    over_tcp.close()
    over_socket.close()


async def test_with_tls_only_to_a_server_that_the_ca_file_vouches_for(
    server: RedisServer, pki: Pki, tmp_path: Path
) -> None:
    server.kill()
    port = server.start_with_tls(pki.folder.service_file(HTTPS))
    url = f"rediss://localhost:{port}"
    connection, _ = await connect(server.settings(url=url, ca_file=pki.folder.ca_certificate, timeout_s=3))
    assert await connection.command(b"PING") == b"PONG"
    connection.close()
    with pytest.raises(RedisUnavailable, match="certificate"):
        await connect(server.settings(url=url, timeout_s=3))
    server.kill()


async def test_a_script_that_the_server_has_forgotten_is_sent_in_full(server: RedisServer) -> None:
    losses = Losses()
    connection, link = await connect(server.settings(), losses)
    await connection.command(b"SCRIPT", b"FLUSH")
    tail = encode_arguments(b"1", b"nothing", b"1", b"call", b"\x94\x90\x90\x90\x00")
    assert await connection.evaluate(link.scripts.admit, tail) == b"\x91\x03"
    # Now it knows it again.
    assert await connection.command(b"SCRIPT", b"EXISTS", link.scripts.admit.digest) == [1]
    assert not losses
    connection.close()


async def test_a_wrong_password_is_said(server: RedisServer, tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("guess")
    with pytest.raises(RedisUnavailable, match="WRONGPASS"):
        await connect(server.settings(password_file=tmp_path / "wrong"))


async def test_nobody_there_is_said(server: RedisServer) -> None:
    server.kill()
    with pytest.raises(RedisUnavailable):
        await connect(server.settings())


async def test_a_server_that_hangs_is_lost_after_the_time_out(server: RedisServer) -> None:
    losses = Losses()
    connection, _ = await connect(server.settings(timeout_s=0.5), losses)
    server.pause()
    loop = asyncio.get_running_loop()
    began = loop.time()
    first, second = connection.command(b"PING"), connection.command(b"PING")
    assert isinstance(await first, Lost)
    assert isinstance(await second, Lost)
    assert 0.25 <= loop.time() - began < 10
    assert losses == ["no answer for 0.5 s"]
    assert isinstance(await connection.command(b"PING"), Lost)


async def test_a_server_that_refuses_to_write_is_of_no_use(server: RedisServer) -> None:
    losses = Losses()
    connection, _ = await connect(server.settings(), losses)
    assert isinstance(await connection.command(b"NO-SUCH-COMMAND"), Lost)
    assert "unknown command" in losses[0]


def test_files_that_cannot_be_read_stop_the_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        RedisLink(RedisSettings(url="redis://localhost", password_file=tmp_path / "nowhere"), "helixflow-test")
    with pytest.raises(UserError, match="nowhere"):
        RedisLink(RedisSettings(url="rediss://localhost", ca_file=tmp_path / "nowhere"), "helixflow-test")


def ignore(_answer: "asyncio.Future[Reply]", _reply: Reply) -> None:
    """Nobody gives up here."""
