"""The life of one engine process: started, waited for, watched, ended."""

import asyncio
import hashlib
import secrets
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import structlog

from helixflow.core.capacity import Replica
from helixflow.core.clock import Clock
from helixflow.core.errors import HelixError
from helixflow.engines.launching import HOST, EngineKind, LaunchSpec, Settled, SleepingKind
from helixflow.pool.broadcast import Broadcast
from helixflow.pool.launcher_client import EngineExit, Engines, RunningEngine
from helixflow.pool.lifecycle import ServingReplica, cause_of_exit
from helixflow.pool.manifest import StoredModel
from helixflow.pool.model_folder import folder_digest
from helixflow.pool.plan import PlannedDeployment

_END_TIMEOUT_S: Final = 10.0
log = structlog.get_logger("helixflow.pool")


@dataclass(frozen=True, slots=True)
class HealthPolicy:
    """How engines are watched, seconds. `failures` in a row mean that an engine hangs.

    One that is to end gets `stop_grace_s` after it was seen doing nothing for `quiet_s` (by then gateways know that it
    is no replica any more), at the latest after `end_grace_s`.
    """

    ready_interval_s: float = 0.05
    load_timeout_s: float = 900.0
    interval_s: float = 5.0
    deadline_s: float = 10.0
    failures: int = 3
    quiet_s: float = 0.2
    quiet_interval_s: float = 0.05
    stop_grace_s: float = 3.0
    end_grace_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a life ended: seconds of service (None: never ready) and why, in one line."""

    ready_s: float | None
    cause: str


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What an engine is started with: its file or folder (None: it finds it itself), `digest` as in `Replica`, its own
    context (0: unknown), and the tokenizer for text that is tokenised outside of it.
    """

    path: Path | None
    digest: str
    context: int = 0
    tokenizer_path: Path | None = None
    tokenizer_sha256: str = ""

    @classmethod
    def collect(cls, planned: PlannedDeployment, model: StoredModel | None) -> "ModelFiles":
        """Those of `model`, or of an engine that has none in the store. Blocks. Raises `OSError`."""
        if model is None:
            folder = planned.model_folder
            return cls(folder, folder_digest(folder) if folder is not None else "")
        tokenizer = getattr(planned.settings, "tokenizer", None) or model.tokenizer_path
        sha256 = hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer is not None else ""
        return cls(model.path, model.sha256, model.context, tokenizer, sha256)


class ReplicaLives:
    """Starts engines for one deployment and stays with each until its end."""

    def __init__(
        self, planned: PlannedDeployment, engines: Engines, kind: EngineKind, policy: HealthPolicy, clock: Clock
    ) -> None:
        self._planned = planned
        self._engines = engines
        self._kind = kind
        self._policy = policy
        self._clock = clock
        self._changes = Broadcast()

    def change(self, planned: PlannedDeployment) -> None:
        """New settings for the same engines; those that run take over what they can."""
        self._planned = planned
        self._changes.bump()

    async def start(self, seat: int, files: ModelFiles, ram_bytes: int, gpus: Mapping[str, int]) -> RunningEngine:
        """A fresh process on a free port with a fresh key. Raises `HelixError` when it cannot be started.

        `ram_bytes` and `gpus` are the memory that it was given, for whoever takes it over.
        """
        planned = self._planned
        port, key = _free_port(), secrets.token_urlsafe(32)
        name = f"{planned.name}#{seat}-{secrets.token_hex(6)}"
        command = self._kind.command(
            LaunchSpec(planned.settings, planned.public_name, files.path, port, key, tuple(gpus))
        )
        meta: dict[str, Any] = {
            "deployment": planned.name,
            "fingerprint": planned.fingerprint,
            "seat": seat,
            "port": port,
            "key": key,
            "context": files.context,
            "tokenizer_path": str(files.tokenizer_path or ""),
            "tokenizer_sha256": files.tokenizer_sha256,
            "digest": files.digest,
            "ram_bytes": ram_bytes,
            "gpus": dict(gpus),
        }
        return await self._engines.start(name, command.argv, env=command.env, stdin=command.stdin, meta=meta)

    async def stay_with(
        self,
        engine: RunningEngine,
        on_ready: Callable[[ServingReplica], None],
        on_gone: Callable[[], None],
        *,
        load_timeout_s: float,
    ) -> Outcome:
        """Waits until it serves, tells `on_ready`, and returns when it has ended, killing it if it hangs.

        `on_ready` is told again when a change of the settings was taken over, `on_gone` at once when it serves no more.
        It has failed when it does not serve within `load_timeout_s`.

        When cancelled it leaves the engine alone: a later control process takes it over.
        """
        ready_at: float | None = None
        started = self._clock.monotonic()
        seen = self._changes.revision
        try:
            serving, cause = await self._wait_ready(engine, load_timeout_s)
            if serving is not None:
                ready_at = self._clock.monotonic()
                log.info("replica.ready", replica=engine.name, pid=engine.pid, load_s=round(ready_at - started, 2))
                on_ready(serving)
                cause = await self._watch(engine, serving, seen, on_ready)
                on_gone()
        except HelixError as exc:
            cause = exc.message
        if not engine.exited.done():
            await self._kill(engine)
        ready_s = None if ready_at is None else self._clock.monotonic() - ready_at
        return Outcome(ready_s, cause)

    async def is_idle(self, engine: RunningEngine) -> bool:
        """Whether it says that it does nothing; false when it does not answer."""
        try:
            return await self._ask(engine) == 0
        except HelixError:
            return False

    async def count_running(self, engine: RunningEngine) -> int:
        """Generations that it works at; 0 when it does not answer, for then it works at nothing that ends well."""
        try:
            return await self._ask(engine)
        except HelixError:
            return 0

    async def end(self, engine: RunningEngine, grace_s: float) -> None:
        """Ends an engine that gets no new generations: once those that run have ended, at the latest after `grace_s`.

        Returns when it has ended. Raises `HelixError` when the launcher is lost.
        """
        await self._until_quiet(engine, grace_s)
        if engine.exited.done():
            return
        await self._engines.stop(engine.name, self._policy.stop_grace_s)
        if await _exit_within(engine, self._policy.stop_grace_s + _END_TIMEOUT_S) is None:
            log.error("replica.stuck", replica=engine.name, pid=engine.pid)

    @property
    def can_sleep(self) -> bool:
        """Whether engines sleep instead of ending when somebody else needs their memory."""
        return isinstance(self._kind, SleepingKind) and self._kind.can_sleep(self._planned.settings)

    async def put_to_sleep(self, engine: RunningEngine, grace_s: float) -> None:
        """As `end`, but for it going on asleep. Raises `HelixError` when it does not."""
        assert isinstance(self._kind, SleepingKind)
        await self._until_quiet(engine, grace_s)
        await self._kind.sleep(int(engine.meta["port"]), str(engine.meta["key"]))

    async def wake(self, engine: RunningEngine) -> None:
        """Raises `HelixError` when it does not wake up."""
        assert isinstance(self._kind, SleepingKind)
        await self._kind.wake(int(engine.meta["port"]), str(engine.meta["key"]))

    async def is_asleep(self, engine: RunningEngine) -> bool:
        """Raises `HelixError` when it does not tell."""
        assert isinstance(self._kind, SleepingKind)
        port, key = int(engine.meta["port"]), str(engine.meta["key"])
        return await self._kind.is_asleep(port, key, self._policy.deadline_s)

    async def _until_quiet(self, engine: RunningEngine, grace_s: float) -> None:
        policy = self._policy
        deadline = self._clock.monotonic() + grace_s
        quiet_since: float | None = None
        while (now := self._clock.monotonic()) < deadline:
            idle = await self.is_idle(engine)
            quiet_since = (quiet_since if quiet_since is not None else now) if idle else None
            if quiet_since is not None and now - quiet_since >= policy.quiet_s:
                return
            if await _exit_within(engine, policy.quiet_interval_s) is not None:
                return
        log.warning("replica.cut_off", replica=engine.name, grace_s=grace_s)

    async def _ask(self, engine: RunningEngine) -> int:
        return await self._kind.read_activity(
            int(engine.meta["port"]), str(engine.meta["key"]), self._policy.deadline_s
        )

    async def _wait_ready(self, engine: RunningEngine, timeout_s: float) -> tuple[ServingReplica | None, str]:
        """The replica once it serves; None and the cause when it ended or takes too long."""
        policy = self._policy
        deadline = self._clock.monotonic() + timeout_s
        port, key = int(engine.meta["port"]), str(engine.meta["key"])
        while self._clock.monotonic() < deadline:
            if (exit_ := await _exit_within(engine, policy.ready_interval_s)) is not None:
                return None, cause_of_exit(exit_.status, exit_.tail, was_ready=False)
            try:
                healthy = await self._kind.is_healthy(port, key, policy.deadline_s)
            except HelixError:
                continue  # nobody listens yet
            if healthy:
                return await self._describe(engine, port, key), ""
        return None, f"did not become ready within {timeout_s:g} s"

    async def _describe(self, engine: RunningEngine, port: int, key: str) -> ServingReplica:
        properties = await self._kind.read_properties(self._planned.settings, port, key, self._policy.deadline_s)
        settled = await self._kind.settle(
            self._planned.settings, self._planned.public_name, port, key, self._policy.deadline_s
        )
        meta = engine.meta
        bounds = (self._planned.settings.context, properties.context, meta.get("context") or 0)
        replica = Replica(
            replica_id=engine.name,
            host=HOST,
            port=port,
            api_key=key,
            slots=properties.slots,
            context=min(bound for bound in bounds if bound > 0),
            supports_tools=properties.supports_tools,
            vocabulary=properties.vocabulary,
            tokenizer_path=str(meta.get("tokenizer_path", "")),
            model_digest=str(meta.get("digest", "")),
        )
        tokenizer_sha256 = str(meta.get("tokenizer_sha256", ""))
        serving = ServingReplica(replica, engine.pid, tuple(meta.get("gpus", ())), tokenizer_sha256)
        return _settled(serving, settled)

    async def _watch(
        self, engine: RunningEngine, serving: ServingReplica, seen: int, on_ready: Callable[[ServingReplica], None]
    ) -> str:
        """Returns the cause when it has ended or hangs. `seen` is the revision of the settings that it has taken over;
        `on_ready` is told what it is after others.
        """
        policy = self._policy
        port, key = int(engine.meta["port"]), str(engine.meta["key"])
        failures = 0
        while failures < policy.failures:
            if (exit_ := await self._exit_or_change(engine, seen)) is not None:
                return cause_of_exit(exit_.status, exit_.tail, was_ready=True)
            if self._changes.revision != seen:
                seen = self._changes.revision
                serving = await self._settle(serving)
                on_ready(serving)
                continue
            try:
                healthy = await self._kind.is_healthy(port, key, policy.deadline_s)
            except HelixError:
                healthy = False
            failures = 0 if healthy else failures + 1
        return f"did not answer {policy.failures} health checks in a row"

    async def _exit_or_change(self, engine: RunningEngine, seen: int) -> EngineExit | None:
        """How it ended, if it does before the next look at it; returns at once when there are other settings."""
        changed = asyncio.create_task(self._changes.wait_beyond(seen), name="changed")
        try:
            done, _ = await asyncio.wait(
                (engine.exited, changed), timeout=self._policy.interval_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            changed.cancel()
        return engine.exited.result() if engine.exited in done else None

    async def _settle(self, serving: ServingReplica) -> ServingReplica:
        """Takes over the settings of now, as far as that is possible while it runs."""
        planned, replica = self._planned, serving.replica
        try:
            settled = await self._kind.settle(
                planned.settings, planned.public_name, replica.port, replica.api_key, self._policy.deadline_s
            )
        except HelixError as exc:
            settled = Settled(replica.adapters, exc.message)
        return _settled(serving, settled)

    async def _kill(self, engine: RunningEngine) -> None:
        """It does not answer, so asking has no use."""
        log.warning("replica.killed", replica=engine.name, pid=engine.pid)
        await self._engines.stop(engine.name, 0)
        if await _exit_within(engine, _END_TIMEOUT_S) is None:
            log.error("replica.stuck", replica=engine.name, pid=engine.pid)


def _settled(serving: ServingReplica, settled: Settled) -> ServingReplica:
    if settled.trouble and settled.trouble != serving.trouble:
        log.warning("replica.incomplete", replica=serving.replica.replica_id, reason=settled.trouble)
    return replace(serving, replica=replace(serving.replica, adapters=settled.adapters), trouble=settled.trouble)


async def _exit_within(engine: RunningEngine, seconds: float) -> EngineExit | None:
    """How it ended, if it does within `seconds`. Raises `HelixError` when the launcher is lost."""
    done, _ = await asyncio.wait((engine.exited,), timeout=seconds)
    return engine.exited.result() if done else None


def _free_port() -> int:
    """A loopback port that was free a moment ago; should somebody take it first, the next start has another."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
