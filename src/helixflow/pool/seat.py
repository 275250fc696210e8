"""One place for a replica of a deployment: pulls the model, keeps an engine in it, backs off, gives up, tries again."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor

import structlog

from helixflow.core.clock import Clock
from helixflow.core.errors import HelixError, UserError
from helixflow.pool.catalogue import ModelSpec
from helixflow.pool.launcher_client import RunningEngine
from helixflow.pool.lifecycle import CrashHistory, GiveUp, SeatView, ServingReplica, State
from helixflow.pool.manifest import StoredModel
from helixflow.pool.plan import PlannedDeployment
from helixflow.pool.progress import PullProgress, Report
from helixflow.pool.replica import Outcome, ReplicaLives

# `ModelStore.pull`; blocks, so it is run in a thread of the seats' executor.
Pull = Callable[[ModelSpec, Report], StoredModel]
log = structlog.get_logger("helixflow.pool")


class _PullAbandonedError(Exception):
    """Raised within a pull whose seat is gone, to end it."""


class Seat:
    """`keep` runs until cancelled; `view` is what it is doing, `on_change` is called after each change of it.

    It does nothing before `want` was called, and nothing more after it gave up until `want` is called again.
    """

    def __init__(
        self,
        index: int,
        planned: PlannedDeployment,
        lives: ReplicaLives,
        history: CrashHistory,
        pull: Pull,
        threads: Executor,
        clock: Clock,
        on_change: Callable[[], None],
    ) -> None:
        self.view = SeatView()
        self.restarts = 0
        self._index = index
        self._planned = planned
        self._lives = lives
        self._history = history
        self._pull = pull
        self._threads = threads
        self._clock = clock
        self._on_change = on_change
        self._wanted = asyncio.Event()
        self._adopted: RunningEngine | None = None

    def want(self) -> None:
        """Asks for a replica. Without effect while the seat is at it."""
        if self.view.state in (State.IDLE, State.FAILED):
            self._history.forgive()
            self._wanted.set()

    def adopt(self, engine: RunningEngine) -> None:
        """Goes on with an engine that an earlier control process started. Before `keep`."""
        self._adopted = engine
        self._wanted.set()

    @property
    def is_vacant(self) -> bool:
        """Whether no engine was adopted or asked for yet."""
        return self._adopted is None and self.view.state is State.IDLE

    async def keep(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                await self._serve()
            except UserError as exc:
                self._show(State.FAILED, " ".join(exc.message.split()))
                log.error("deployment.failed", deployment=self._planned.name, cause=exc.message)
            except Exception as exc:
                self._show(State.FAILED, f"unexpected {type(exc).__name__}: {' '.join(str(exc).split())}")
                log.exception("deployment.failed", deployment=self._planned.name)

    async def _serve(self) -> None:
        """Engine after engine until it makes no sense any more. Raises `UserError` when the model cannot be had."""
        model: StoredModel | None = None
        while True:
            engine, self._adopted = self._adopted, None
            if engine is None and model is None:
                model = await self._fetch()
            self._show(State.LOADING)
            outcome = await self._live(engine, model)
            match self._history.decide(outcome.ready_s):
                case GiveUp():
                    self._show(State.FAILED, outcome.cause)
                    log.error("deployment.failed", deployment=self._planned.name, cause=outcome.cause)
                    return
                case restart:
                    self._show(State.BACKOFF, outcome.cause, retry_at=self._clock.monotonic() + restart.delay_s)
                    log.warning(
                        "replica.down",
                        deployment=self._planned.name,
                        cause=outcome.cause,
                        restart_in_s=round(restart.delay_s, 2),
                    )
                    await asyncio.sleep(restart.delay_s)
                    self.restarts += 1

    async def _live(self, engine: RunningEngine | None, model: StoredModel | None) -> Outcome:
        try:
            if engine is None:
                assert model is not None
                engine = await self._lives.start(self._index, model)
            return await self._lives.stay_with(engine, self._show_ready, self._show_gone)
        except HelixError as exc:
            return Outcome(None, exc.message)

    def _show_ready(self, serving: ServingReplica) -> None:
        self._show(State.READY, serving=serving)

    def _show_gone(self) -> None:
        self._show(State.LOADING)

    def _show(
        self, state: State, detail: str = "", *, retry_at: float = 0.0, serving: ServingReplica | None = None
    ) -> None:
        view = SeatView(state, detail, retry_at, serving)
        if view != self.view:
            self.view = view
            self._on_change()

    async def _fetch(self) -> StoredModel:
        """The model from the store. A cancelled wait makes the pull end at its next report of progress."""
        self._show(State.PULLING, "waiting for the model store")
        loop = asyncio.get_running_loop()
        abandoned = threading.Event()

        def report(progress: PullProgress) -> None:
            if abandoned.is_set():
                raise _PullAbandonedError
            loop.call_soon_threadsafe(self._show_progress, describe_progress(progress))

        try:
            return await loop.run_in_executor(self._threads, self._pull, self._planned.spec, report)
        finally:
            abandoned.set()

    def _show_progress(self, text: str) -> None:
        if self.view.state is State.PULLING:
            self._show(State.PULLING, text)


def describe_progress(progress: PullProgress) -> str:
    """`downloading 42 %`: whole percents, so that watchers hear of each one once."""
    if not progress.total_bytes:
        return progress.phase
    return f"{progress.phase} {100 * progress.done_bytes // progress.total_bytes} %"
