"""How a connection to the server is made: its address, TLS, who we are, our scripts."""

import asyncio
import ssl
from collections.abc import Callable
from typing import Final
from urllib.parse import unquote, urlsplit

import structlog
from msgspec import Struct

from helixflow.core.errors import ExitCode, UserError
from helixflow.metering.redis.connection import Answer, Lost, RedisConnection
from helixflow.metering.redis.resp import Reply
from helixflow.metering.redis.scripts import Scripts
from helixflow.settings.tree import RedisSettings
from helixflow.transport.tls import client_context

DEFAULT_PORT: Final = 6379
_USER: Final = "default"

log = structlog.get_logger("helixflow.metering")


class RedisUnavailable(Exception):
    """No connection could be made; the message says why."""


class Address(Struct, frozen=True):
    """Where the server is: `path` of a socket, or `host` and `port`. `database` is its number."""

    host: str = ""
    port: int = DEFAULT_PORT
    path: str = ""
    database: int = 0
    tls: bool = False


def parse_url(url: str) -> Address:
    """Raises `UserError` (CONFIG) that says what is expected."""
    problem = f"redis.url: {url!r} is not of the form redis://host:port/database, rediss://… or unix:///path"
    try:
        parts = urlsplit(url)
        if parts.scheme == "unix" and parts.path and not parts.netloc:
            return Address(path=unquote(parts.path))
        database = int(parts.path.strip("/") or 0)
        if parts.scheme in ("redis", "rediss") and parts.hostname and database >= 0:
            return Address(parts.hostname, parts.port or DEFAULT_PORT, "", database, parts.scheme == "rediss")
    except ValueError as exc:
        raise UserError(problem, ExitCode.CONFIG) from exc
    raise UserError(problem, ExitCode.CONFIG)


class RedisLink:
    """Makes connections as the settings say. Reads the password and the CA file now: blocks.

    Raises `UserError` (CONFIG).
    """

    def __init__(self, settings: RedisSettings, name: str) -> None:
        self.address = parse_url(settings.url)
        self.timeout_s = float(settings.timeout_s)
        self.scripts = Scripts()
        self._name = name
        self._user = settings.user or _USER
        self._tls: ssl.SSLContext | None = None
        try:
            self._password = settings.password.read() if settings.password is not None else ""
            if self.address.tls:
                self._tls = client_context(settings.ca_file)
        except ValueError as exc:
            raise UserError(f"redis: {exc}", ExitCode.CONFIG) from exc

    async def connect(
        self, unclaimed: Callable[[Answer, Reply], None], on_lost: Callable[[str], None]
    ) -> tuple[RedisConnection, str]:
        """A connection that knows us and our scripts, and the id of the server's run.

        Raises `RedisUnavailable`, within the time-out; `on_lost` may have been called then, too.
        """
        loop = asyncio.get_running_loop()
        connection = RedisConnection(loop, self.timeout_s, unclaimed=unclaimed, on_lost=on_lost)
        try:
            async with asyncio.timeout(self.timeout_s):
                await self._open_socket(loop, connection)
                return connection, await self._introduce(connection)
        except TimeoutError as exc:
            connection.close()
            raise RedisUnavailable("no connection in time") from exc
        except OSError as exc:
            connection.close()
            raise RedisUnavailable(exc.strerror or str(exc) or "no connection") from exc
        except BaseException:
            connection.close()
            raise

    async def _open_socket(self, loop: asyncio.AbstractEventLoop, connection: RedisConnection) -> None:
        address = self.address
        if address.path:
            await loop.create_unix_connection(lambda: connection, address.path)
            return
        await loop.create_connection(lambda: connection, address.host, address.port, ssl=self._tls)

    async def _introduce(self, connection: RedisConnection) -> str:
        hello = [b"HELLO", b"3"]
        if self._password:
            hello += [b"AUTH", self._user.encode(), self._password.encode()]
        answers = [connection.command(*hello, b"SETNAME", self._name.encode())]
        if self.address.database:
            answers.append(connection.command(b"SELECT", b"%d" % self.address.database))
        about = [connection.command(b"INFO", b"server"), connection.command(b"INFO", b"memory")]
        answers += [connection.command(b"SCRIPT", b"LOAD", script.source) for script in self.scripts.all]
        for answer in (*answers, *about):
            reply = await answer
            if type(reply) is Lost:
                raise RedisUnavailable(reply.reason)
        server, memory = (_parse_info(answer.result()) for answer in about)
        if "run_id" not in server:
            raise RedisUnavailable("the server does not say which run of it this is (INFO server)")
        if memory.get("maxmemory", "0") != "0" and memory.get("maxmemory_policy") != "noeviction":
            log.warning(
                "redis.evicts",
                policy=memory.get("maxmemory_policy"),
                advice="set maxmemory-policy noeviction: budgets are not kept where the server forgets at will",
            )
        return server["run_id"]


def _parse_info(reply: Reply) -> dict[str, str]:
    text = reply.decode("utf-8", "replace") if isinstance(reply, bytes) else ""
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line and not line.startswith("#"))
