"""The pool's side of the launcher's Unix socket: start, stop and find engines, and learn of their ends."""

import asyncio
import contextlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from helixflow.core.errors import ErrorKind, HelixError

CALL_TIMEOUT_S: Final = 10.0
_LINE_LIMIT: Final = 16 << 20
_LOST: Final = "The launcher cannot be reached."


@dataclass(frozen=True, slots=True)
class EngineExit:
    """How an engine ended: `status` negative for a signal; `tail` its last lines of output."""

    status: int
    tail: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunningEngine:
    """An engine process of the launcher. `exited` is done once it has ended, or fails when the launcher is lost."""

    name: str
    pid: int
    meta: Mapping[str, Any] = field(repr=False)  # the engine's key is in it
    exited: "asyncio.Future[EngineExit]"


class Engines(Protocol):
    """Who runs engine processes: the launcher, or a test."""

    async def start(
        self, name: str, argv: Sequence[str], *, env: Mapping[str, str], stdin: str, meta: Mapping[str, Any]
    ) -> RunningEngine:
        """Starts `argv` under `name`. Raises `HelixError` (UNAVAILABLE) when it cannot be started."""
        ...

    async def stop(self, name: str, grace_s: float) -> None:
        """Asks it to end, SIGKILL after `grace_s` (0: at once). Returns before it has. An unknown name is fine."""
        ...

    async def list(self) -> tuple[RunningEngine, ...]:
        """All engines that run now."""
        ...


class LauncherClient:
    """`Engines` over the launcher's socket. `lost` is set when the connection ends: without it nothing can go on."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._ids = itertools.count(1)
        self._calls: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._exits: dict[str, asyncio.Future[EngineExit]] = {}
        self.lost = asyncio.Event()
        self._receiving = asyncio.create_task(self._receive(), name="launcher-client")

    @classmethod
    async def connect(cls, path: Path) -> "LauncherClient":
        """Raises `HelixError` (UNAVAILABLE) when no launcher listens on `path`."""
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                reader, writer = await asyncio.open_unix_connection(path, limit=_LINE_LIMIT)
        except OSError as exc:
            raise HelixError(ErrorKind.UNAVAILABLE, _LOST) from exc
        return cls(reader, writer)

    async def start(
        self, name: str, argv: Sequence[str], *, env: Mapping[str, str], stdin: str, meta: Mapping[str, Any]
    ) -> RunningEngine:
        exited = self._exit_of(name)
        try:
            reply = await self._call(
                {"op": "start", "name": name, "argv": list(argv), "env": dict(env), "stdin": stdin, "meta": dict(meta)}
            )
        except BaseException:
            if self._exits.get(name) is exited:
                del self._exits[name]
            raise
        return RunningEngine(name, int(reply["pid"]), meta, exited)

    async def stop(self, name: str, grace_s: float) -> None:
        await self._call({"op": "stop", "name": name, "grace_s": grace_s})

    async def list(self) -> tuple[RunningEngine, ...]:
        reply = await self._call({"op": "list"})
        return tuple(
            RunningEngine(engine["name"], engine["pid"], engine["meta"] or {}, self._exit_of(engine["name"]))
            for engine in reply["engines"]
            if not engine["stopping"]
        )

    async def close(self) -> None:
        """Ends the connection; engines go on. Idempotent."""
        self._receiving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._receiving

    async def _call(self, request: dict[str, Any]) -> dict[str, Any]:
        if self.lost.is_set():
            raise HelixError(ErrorKind.UNAVAILABLE, _LOST)
        number = next(self._ids)
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._calls[number] = answer
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                self._writer.write(json.dumps({"id": number, **request}).encode() + b"\n")
                await self._writer.drain()
                reply = await answer
        except (OSError, TimeoutError) as exc:
            raise HelixError(ErrorKind.UNAVAILABLE, _LOST) from exc
        finally:
            del self._calls[number]
        if not reply.get("ok"):
            raise HelixError(ErrorKind.UNAVAILABLE, f"The launcher refused: {reply.get('error')}")
        return reply

    async def _receive(self) -> None:
        try:
            with contextlib.suppress(OSError, ValueError):  # a broken connection, or a line that is no JSON or too long
                while line := await self._reader.readline():
                    self._take(json.loads(line))
        finally:
            self._lose()

    def _take(self, message: dict[str, Any]) -> None:
        if message.get("event") == "exited":
            exited = self._exits.pop(message["name"], None)
            if exited is not None and not exited.done():
                exited.set_result(EngineExit(message["status"], tuple(message["tail"])))
            return
        # Before the caller runs again, an engine of the list may have ended: the place for its exit must exist.
        for engine in message.get("engines", ()):
            self._exit_of(engine["name"])
        answer = self._calls.get(message.get("id") or 0)
        if answer is not None and not answer.done():
            answer.set_result(message)

    def _exit_of(self, name: str) -> "asyncio.Future[EngineExit]":
        if name not in self._exits:
            self._exits[name] = asyncio.get_running_loop().create_future()
        return self._exits[name]

    def _lose(self) -> None:
        self.lost.set()
        self._writer.close()
        for call in self._calls.values():
            _fail(call)
        for exited in self._exits.values():
            _fail(exited)


def _fail(future: "asyncio.Future[Any]") -> None:
    if not future.done():
        future.set_exception(HelixError(ErrorKind.UNAVAILABLE, _LOST))
        future.exception()  # nobody may be waiting; that is no error of its own
