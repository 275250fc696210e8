"""One place for a replica of a deployment: gets model and memory, keeps an engine in it, backs off, gives up."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import structlog

from helixflow.core.clock import Clock
from helixflow.core.errors import ExitCode, HelixError, UserError
from helixflow.pool.launcher_client import RunningEngine
from helixflow.pool.lifecycle import CrashHistory, GiveUp, SeatView, ServingReplica, State
from helixflow.pool.manifest import StoredModel
from helixflow.pool.memory import Need
from helixflow.pool.plan import PlannedDeployment
from helixflow.pool.progress import PullProgress
from helixflow.pool.pulls import Pulls
from helixflow.pool.replica import ModelFiles, Outcome, ReplicaLives
from helixflow.pool.residency import NoRoomError, Residency, Room, Tenant
from helixflow.pool.sleep import Sleep

_ASLEEP: Final = "asleep"
log = structlog.get_logger("helixflow.pool")


class Figures(Protocol):
    """What replicas need: `MemoryFigures`, or nothing at all. Both methods block."""

    def need(self, planned: PlannedDeployment, files: ModelFiles) -> Need:
        """Raises `ValueError` or `OSError` when the files cannot be used."""
        ...

    def note(self, planned: PlannedDeployment, digest: str, need: Need, pid: int, *, fresh: bool) -> Need: ...


@dataclass(frozen=True, slots=True)
class Means:
    """What seats work with: the store's pulls, the node's memory, and what is known of models in it."""

    pulls: Pulls
    residency: Residency
    figures: Figures
    clock: Clock
    load_timeout_s: float


class Seat:
    """`keep` runs until cancelled; `view` is what it is doing, `on_change` is called after each change of it.

    It does nothing before `want` was called, and nothing more after it gave up until `want` is called again.
    `may_evict` is asked before it loads: whether idle models may be unloaded for it.
    """

    def __init__(
        self,
        index: int,
        planned: PlannedDeployment,
        tenant: Tenant,
        lives: ReplicaLives,
        history: CrashHistory,
        means: Means,
        on_change: Callable[[], None],
        may_evict: Callable[[], bool],
    ) -> None:
        self.index = index
        self.view = SeatView()
        self.restarts = 0
        self._planned = planned
        self._tenant = tenant
        self._lives = lives
        self._history = history
        self._means = means
        self._on_change = on_change
        self._may_evict = may_evict
        self._asked = asyncio.Event()
        self._wanted = False
        self._leaving = asyncio.Event()
        self._grace_s = 0.0
        self._dismissed = False
        self._may_sleep = False
        self._sleep = Sleep(planned, tenant, lives, means.residency)
        self._is_adopted = False
        self._engine: RunningEngine | None = None
        self._room: Room | None = None

    def want(self) -> None:
        """Asks for a replica. Without effect while the seat is at it; one that is being emptied is filled again."""
        if self.view.state in (State.IDLE, State.FAILED) or self._leaving.is_set():
            self._history.forgive()
            self._wanted = True
            self._asked.set()
            # At once, so that nobody takes it for a seat that needs to be asked, or that has failed at this.
            self._show(State.PULLING)

    def adopt(self, engine: RunningEngine) -> None:
        """Goes on with an engine that an earlier control process started. Before `keep`."""
        meta = engine.meta
        need = Need(int(meta.get("ram_bytes", 0)), measured=True)
        self._engine = engine
        self._room = self._means.residency.adopt(self._tenant, need, dict(meta.get("gpus") or {}))
        self._is_adopted = True
        self._wanted = True
        self._asked.set()
        self._show(State.LOADING)

    def leave(self, grace_s: float, *, for_good: bool = False, may_sleep: bool = False) -> None:
        """Empties the seat: no new generations from now on; those that run may go on for `grace_s`.

        `for_good`: `keep` returns then. `may_sleep`: an engine that can need not end.
        """
        self._dismissed = self._dismissed or for_good
        self._may_sleep = may_sleep and (self._may_sleep or not self._leaving.is_set())
        self._wanted = False
        self._grace_s = grace_s if self.view.serving is not None or self._leaving.is_set() else 0.0
        self._leaving.set()
        self._asked.set()
        if self._engine is not None:
            self._show(State.UNLOADING, serving=self.view.serving)
        else:
            self._show(State.IDLE)

    @property
    def is_vacant(self) -> bool:
        """Whether it has no engine."""
        return self._engine is None

    @property
    def is_asleep(self) -> bool:
        """Whether its engine sleeps."""
        return self._sleep.is_asleep

    @property
    def is_leaving(self) -> bool:
        return self._leaving.is_set()

    @property
    def is_dismissed(self) -> bool:
        return self._dismissed

    @property
    def need(self) -> Need | None:
        """The memory that it has."""
        return self._room.need if self._room is not None else None

    async def is_idle(self) -> bool:
        """Whether its engine, if it has one, says that it does nothing."""
        return self._engine is None or await self._lives.is_idle(self._engine)

    async def count_running(self) -> int:
        """Generations that its engine works at; 0 without one, or when it does not answer."""
        return await self._lives.count_running(self._engine) if self._engine is not None else 0

    async def keep(self) -> None:
        while self._leaving.is_set() or not self._dismissed:
            await self._until_asked()
            self._asked.clear()
            if self._leaving.is_set():
                await self._depart()
            elif self._wanted:
                self._wanted = False
                await self._serve_until_told()

    async def _until_asked(self) -> None:
        """Meanwhile an engine that sleeps may end by itself."""
        engine = self._engine
        if engine is not None and self._sleep.is_asleep:
            asked = asyncio.create_task(self._asked.wait(), name="asked")
            try:
                await asyncio.wait((asked, engine.exited), return_when=asyncio.FIRST_COMPLETED)
            finally:
                asked.cancel()
            if engine.exited.done():
                log.warning("replica.ended_asleep", replica=engine.name)
                self._vacate()
                self._show(State.IDLE)
        await self._asked.wait()

    async def _serve_until_told(self) -> None:
        """Ends when it makes no sense any more to go on, or when it is to leave, with the engine as it then is."""
        serving = asyncio.create_task(self._try_to_serve(), name="serving")
        told = asyncio.create_task(self._leaving.wait(), name="told")
        try:
            await asyncio.wait((serving, told), return_when=asyncio.FIRST_COMPLETED)
        finally:
            serving.cancel()
            told.cancel()
            await asyncio.wait((serving, told))

    async def _depart(self) -> None:
        engine, detail = self._engine, ""
        if engine is not None:
            await self._note(fresh=False)
            if await self._fall_asleep(engine):
                detail = _ASLEEP
            else:
                try:
                    await self._lives.end(engine, self._grace_s)
                except HelixError as exc:
                    log.warning("replica.not_ended", replica=engine.name, reason=exc.message)
                self._engine = None
        if self._engine is None:
            self._vacate()
        self._leaving.clear()
        self._show(State.IDLE, detail)
        self._means.residency.wake()  # one that sleeps can be made to leave once more
        self._on_change()  # it may have looked empty before: now it is
        if self._wanted:
            self._asked.set()

    async def _fall_asleep(self, engine: RunningEngine) -> bool:
        """False when it has to end: also when that was asked for while it fell asleep."""
        room = self._room
        if not self._may_sleep or room is None:
            return False
        return await self._sleep.fall_asleep(engine, room, self._grace_s) and self._may_sleep

    def _vacate(self) -> None:
        """There is no engine any more."""
        self._engine = None
        self._sleep.is_asleep = False
        self._free_memory()

    async def _try_to_serve(self) -> None:
        name = self._planned.name
        try:
            await self._serve()
        except NoRoomError as exc:
            if exc.is_final:
                log.error("deployment.failed", deployment=name, cause=str(exc))
            self._show(State.FAILED if exc.is_final else State.IDLE, str(exc), lacks_memory=True)
        except UserError as exc:
            self._show(State.FAILED, " ".join(exc.message.split()))
            log.error("deployment.failed", deployment=name, cause=exc.message)
        except Exception as exc:
            self._show(State.FAILED, f"unexpected {type(exc).__name__}: {' '.join(str(exc).split())}")
            log.exception("deployment.failed", deployment=name)
        finally:
            if self._engine is None:
                self._free_memory()

    async def _serve(self) -> None:
        """Engine after engine until it makes no sense any more. Raises `UserError` when the model cannot be had, and
        `NoRoomError`.
        """
        files: ModelFiles | None = None
        if self._is_adopted and self._engine is not None and self._room is not None:
            self._is_adopted = False
            if await self._sleep.recognise(self._engine, self._room):
                self._show(State.IDLE, _ASLEEP)
                return
        while True:
            if self._engine is None and files is None:
                files = await self._fetch()
            self._show(State.LOADING)
            outcome = await self._live(files)
            self._engine = None
            self._free_memory()
            match self._history.decide(outcome.ready_s):
                case GiveUp():
                    self._show(State.FAILED, outcome.cause)
                    log.error("deployment.failed", deployment=self._planned.name, cause=outcome.cause)
                    return
                case restart:
                    retry_at = self._means.clock.monotonic() + restart.delay_s
                    self._show(State.BACKOFF, outcome.cause, retry_at=retry_at)
                    log.warning(
                        "replica.down",
                        deployment=self._planned.name,
                        cause=outcome.cause,
                        restart_in_s=round(restart.delay_s, 2),
                    )
                    await asyncio.sleep(restart.delay_s)
                    self.restarts += 1

    async def _live(self, files: ModelFiles | None) -> Outcome:
        """The life of one engine. Raises `NoRoomError`, and `UserError` for a file that cannot be used any more."""
        clock = self._means.clock
        deadline = clock.monotonic() + self._means.load_timeout_s
        measuring: asyncio.Task[None] | None = None

        def on_ready(serving: ServingReplica) -> None:
            nonlocal measuring
            assert self._room is not None
            if measuring is None:
                self._room.settle()
            self._show(State.READY, serving.trouble, serving=serving)
            if measuring is None:
                measuring = asyncio.create_task(self._note(fresh=True), name="measuring")

        try:
            if self._engine is None:
                assert files is not None
                await self._start(files, deadline)
            elif self._sleep.is_asleep:
                await self._wake(self._engine, deadline)
            assert self._engine is not None
            remaining_s = max(0.0, deadline - clock.monotonic())
            return await self._lives.stay_with(
                self._engine, on_ready, lambda: self._show(State.LOADING), load_timeout_s=remaining_s
            )
        except HelixError as exc:
            return Outcome(None, exc.message)
        finally:
            if measuring is not None:
                measuring.cancel()
                await asyncio.wait((measuring,))

    async def _wake(self, engine: RunningEngine, deadline: float) -> None:
        """Raises `NoRoomError`, after which it still sleeps, and `HelixError`, after which it has ended."""
        assert self._room is not None
        try:
            await self._sleep.wake(
                engine,
                self._room,
                deadline=deadline,
                evict=self._may_evict(),
                tell=lambda reason: self._show(State.LOADING, reason),
            )
        except HelixError:
            await self._lives.end(engine, 0)
            raise
        self._show(State.LOADING)

    async def _start(self, files: ModelFiles, deadline: float) -> None:
        try:
            need = await asyncio.to_thread(self._means.figures.need, self._planned, files)
        except ValueError as exc:
            raise UserError(f"{self._planned.name}: {exc}", ExitCode.MODEL) from exc
        except OSError as exc:
            raise UserError(f"{self._planned.name}: {exc.filename}: {exc.strerror}", ExitCode.STORAGE) from exc
        room = self._room = await self._means.residency.admit(
            self._tenant,
            need,
            deadline=deadline,
            evict=self._may_evict(),
            tell=lambda reason: self._show(State.LOADING, reason),
        )
        self._show(State.LOADING)
        starting = asyncio.ensure_future(self._lives.start(self.index, files, need.ram_bytes, room.gpus))
        try:
            self._engine = await asyncio.shield(starting)
        except asyncio.CancelledError:
            # It may run already: whoever ends this seat, or takes it over, must know of it.
            with contextlib.suppress(HelixError):
                self._engine = await starting
            raise

    async def _note(self, *, fresh: bool) -> None:
        """Measures what the engine takes."""
        engine, room = self._engine, self._room
        if engine is None or room is None or room.is_loading:
            return
        digest = str(engine.meta.get("digest", ""))
        note = self._means.figures.note
        room.correct(await asyncio.to_thread(note, self._planned, digest, room.need, engine.pid, fresh=fresh))
        self._on_change()

    def _free_memory(self) -> None:
        room, self._room = self._room, None
        if room is not None:
            room.release()

    def _show(
        self,
        state: State,
        detail: str = "",
        *,
        retry_at: float = 0.0,
        serving: ServingReplica | None = None,
        lacks_memory: bool = False,
    ) -> None:
        if self._leaving.is_set() and state not in (State.UNLOADING, State.IDLE):
            return  # what it was doing is being given up
        view = SeatView(state, detail, retry_at, serving, lacks_memory)
        if view != self.view:
            self.view = view
            self._on_change()

    async def _fetch(self) -> ModelFiles:
        """The model's files, out of the store if the engine does not bring its own. Raises `UserError`."""
        self._show(State.PULLING, "waiting for the model store")
        spec = self._planned.spec
        model: StoredModel | None = None
        if spec is not None:
            model = await self._means.pulls.pull(spec, self._show_progress)
        try:
            return await asyncio.to_thread(ModelFiles.collect, self._planned, model)
        except OSError as exc:
            raise UserError(f"{self._planned.name}: {exc.filename}: {exc.strerror}", ExitCode.STORAGE) from exc

    def _show_progress(self, progress: PullProgress) -> None:
        if self.view.state is State.PULLING:
            self._show(State.PULLING, describe_progress(progress))


def describe_progress(progress: PullProgress) -> str:
    """`downloading 42 %`: whole percents, so that watchers hear of each one once."""
    if not progress.total_bytes:
        return progress.phase
    return f"{progress.phase} {100 * progress.done_bytes // progress.total_bytes} %"
