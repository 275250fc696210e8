"""Metering as a gateway composes it: journal, policies, prices, limiter, and what goes on beside requests."""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Final

import grpc
import structlog

from helixflow.clients.changes import ChangeWatch
from helixflow.core.call import Call, Completer
from helixflow.core.clock import Clock
from helixflow.core.errors import HelixError
from helixflow.metering.admission import Limiter
from helixflow.metering.collector import MeteringCollector
from helixflow.metering.demand import Estimator
from helixflow.metering.deployments import deployment_refs
from helixflow.metering.journal.acknowledged import write_acknowledged
from helixflow.metering.journal.writer import JournalWriter
from helixflow.metering.ledger_client import LedgerClient
from helixflow.metering.memory_limiter import MemoryLimiter
from helixflow.metering.meter import Metered
from helixflow.metering.node import read_node_id
from helixflow.metering.policy_cache import PolicyCache
from helixflow.metering.price_book import PriceBook
from helixflow.metering.redis.redis_limiter import RedisLimiter
from helixflow.process.backoff import Backoff
from helixflow.settings.models import ModelSettings
from helixflow.settings.tree import Settings

_UNREGISTERED_S: Final = 10.0

log = structlog.get_logger("helixflow.gateway")


class GatewayMetering:
    """Everything that one gateway needs to meter its calls. `wrap` once, `run` while it serves, `close` at the end.

    Opening it makes this gateway's journal: raises `UserError` (STORAGE).
    """

    def __init__(self, settings: Settings, channel: grpc.aio.Channel, watch: ChangeWatch, clock: Clock) -> None:
        metering = settings.metering
        self._settings = settings
        self._clock = clock
        self._node_id = read_node_id(settings)
        self.journal = JournalWriter.open(
            settings.journal_dir,
            segment_bytes=metering.segment_bytes,
            durability=metering.durability,
            sync_interval_s=metering.sync_interval_s,
            clock=clock,
        )
        self._ledger = LedgerClient(channel)
        self._policies = PolicyCache(
            channel,
            watch,
            size=metering.policy_cache_size,
            grace_s=settings.gateway.key_cache_grace_s,
            clock=clock,
        )
        self._prices = PriceBook(channel, watch, deployment_refs(settings.models), clock)
        self._metered: Metered | None = None
        self._estimator: Estimator | None = None
        self.limiter = self._build_limiter()

    def wrap(self, inner: Completer) -> Metered:
        """The same, metered."""
        metering = self._settings.metering
        self._estimator = Estimator(
            expected_completion=metering.expected_completion_tokens,
            media_tokens=metering.media_tokens,
        )
        self._metered = Metered(
            inner,
            estimator=self._estimator,
            policies=self._policies,
            prices=self._prices,
            limiter=self.limiter,
            journal=self.journal,
            progress_interval_s=metering.progress_interval_s,
            clock=self._clock,
        )
        return self._metered

    async def prepare(self, models: Sequence[ModelSettings]) -> None:
        """Makes sure that calls of these models can be rated. Raises `HelixError`."""
        await self._prices.use(deployment_refs(models))

    def cost_bound(self, deployment: str, call: Call) -> int:
        """Nanodollars that a call costs at most at a deployment. Only between `wrap` and `close`."""
        assert self._estimator is not None
        bounds = self._estimator.bounds(call)
        left_s = call.deadline - asyncio.get_running_loop().time()
        return self._prices.dearest_bound(
            (deployment,), int(self._clock.now() * 1000), bounds.prompt, bounds.completion, int(left_s * 1000)
        )

    def collect_from(self, metered: Metered) -> MeteringCollector:
        """Its figures, for a registry."""
        return MeteringCollector(metered, self.journal, self.limiter, self._settings.run_dir)

    async def run(self) -> None:
        """Until cancelled."""
        assert self._metered is not None
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.journal.run(), name="journal")
            tasks.create_task(self.limiter.run(), name="limiter")
            tasks.create_task(self._prices.run(), name="prices")
            tasks.create_task(self._metered.run(), name="progress")
            tasks.create_task(self._register(), name="registration of the journal")

    @property
    def ready(self) -> bool:
        """Whether calls can be rated."""
        return self._prices.ready

    async def flush(self) -> None:
        """Sends the last settlements: when all calls have ended, and before `run` is cancelled."""
        await self.limiter.close()

    async def close(self) -> None:
        """Closes the journal. Cancel `run` before."""
        await self._policies.close()
        await self.journal.close()

    def _build_limiter(self) -> Limiter:
        if self._settings.redis.url:
            return RedisLimiter(
                self._settings.redis,
                self._ledger,
                self._clock,
                journal_id=self.journal.journal_id,
                position=self._settled_to,
                acknowledge=partial(write_acknowledged, self.journal.folder),
            )
        return MemoryLimiter(
            self._ledger,
            self._clock,
            journal_id=self.journal.journal_id,
            node_id=self._node_id,
            position=self._settled_to,
        )

    def _settled_to(self) -> int:
        return self._metered.settled_to if self._metered is not None else 0

    async def _register(self) -> None:
        """Tells the ledger of the journal; until that has succeeded no budget is loaded."""
        backoff = Backoff(initial_s=0.05, maximum_s=1.0, jitter=0.5)
        begun, told = self._clock.monotonic(), False
        while True:
            try:
                await self._ledger.open_journal(self.journal.journal_id, self._node_id, int(self._clock.now() * 1000))
            except HelixError as exc:
                # Services start in any order.
                if not told and self._clock.monotonic() - begun > _UNREGISTERED_S:
                    told = True
                    log.warning("journal.unregistered", code=exc.code, reason=exc.message)
            else:
                if told:
                    log.info("journal.registered")
                await self._look_for_others()
                return
            await asyncio.sleep(backoff.next_delay_s(0))

    async def _look_for_others(self) -> None:
        """Gateways of other nodes on this database need Redis: else each of them grants all of every limit."""
        if self._settings.redis.url:
            return
        try:
            open_journals = (await self._ledger.read([])).open_journals.values()
        except HelixError as exc:
            log.debug("journals.unread", code=exc.code)
            return
        if any(journal.node_id != self._node_id for journal in open_journals):
            log.warning("limits.unshared", advice="other nodes use this database: set redis.url on all of them")
