"""What the auth service does about use: the ledger, policies and prices, asked by gateways and by administrators."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import grpc
import structlog

from helixflow.auth import budgets, limits
from helixflow.auth.chores import Chore
from helixflow.auth.dispatch import Conversation, Flow, Operation
from helixflow.auth.ledger import giving_up, requests, usage
from helixflow.auth.ledger.ledger import Ledger
from helixflow.auth.ledger.partitions import make_partitions
from helixflow.auth.ledger.retention import ledger_chores
from helixflow.auth.lookups import Lookups
from helixflow.auth.policy_lookup import resolve_policies
from helixflow.auth.policy_tidying import prune_policies
from helixflow.auth.price_lookup import PriceLookup
from helixflow.auth.prices import price_operations
from helixflow.auth.thresholds import BudgetThresholds
from helixflow.core.clock import Clock
from helixflow.core.errors import HelixError
from helixflow.rpc.generated.auth_v1 import metering_pb2 as pb
from helixflow.rpc.generated.auth_v1 import metering_pb2_grpc
from helixflow.settings.tree import Settings
from helixflow.storage.engine import Database

_Context = grpc.aio.ServicerContext[Any, Any]
_POLICIES_EVERY_S: Final = 600

log = structlog.get_logger("helixflow.auth")


class MeteringService(metering_pb2_grpc.MeteringServiceServicer):
    """MeteringService of proto/helixflow/auth/v1. Errors are `HelixError`s; the interceptor renders them."""

    def __init__(self, settings: Settings, database: Database, clock: Clock) -> None:
        self._lookups = Lookups(database)
        self.prices = PriceLookup(database, settings.metering, settings.models, clock)
        self.thresholds = BudgetThresholds(database, clock)
        self.ledger = Ledger(database, clock, self.thresholds.note_spend)
        self._database = database
        self._clock = clock
        self._retention_days = settings.metering.retention_days

    async def begin(self) -> None:
        """What is done before anybody ships. Raises nothing: without its partition a month is stored as well."""
        try:
            await make_partitions(self._database, int(self._clock.now()))
        except HelixError as exc:
            # A backup reads, say. It is a chore as well.
            log.warning("ledger.partitions_put_off", code=exc.code, reason=exc.message)

    def operations(self) -> Mapping[str, Operation | Conversation | Flow]:
        """Those of UsageService, for the dispatcher."""
        return {
            **limits.OPERATIONS,
            **budgets.OPERATIONS,
            **price_operations(self.prices),
            **usage.OPERATIONS,
            **requests.OPERATIONS,
            **giving_up.OPERATIONS,
        }

    def chores(self) -> Sequence[Chore]:
        """What is to be tidied up now and then."""
        policies = Chore("policies", _POLICIES_EVERY_S, lambda now: prune_policies(self._database, now))
        return (*ledger_chores(self._database, self._retention_days), policies)

    async def ResolvePolicies(
        self, request: pb.ResolvePoliciesRequest, context: _Context
    ) -> pb.ResolvePoliciesResponse:
        return await resolve_policies(self._lookups, request)

    async def ResolvePrices(self, request: pb.ResolvePricesRequest, context: _Context) -> pb.ResolvePricesResponse:
        return await self.prices.resolve(request)

    async def OpenJournal(self, request: pb.OpenJournalRequest, context: _Context) -> pb.OpenJournalResponse:
        return await self.ledger.open_journal(request)

    async def ShipRecords(self, request: pb.ShipRecordsRequest, context: _Context) -> pb.ShipRecordsResponse:
        return await self.ledger.ship_records(request)

    async def ReadSpend(self, request: pb.ReadSpendRequest, context: _Context) -> pb.ReadSpendResponse:
        return await self.ledger.read_spend(request)
