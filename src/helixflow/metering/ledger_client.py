"""The ledger, asked over gRPC: where journals are announced, where their rows go, and what budgets have spent."""

from collections.abc import Sequence
from typing import Any, Final

import grpc

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.shipping.shipments import Shipment
from helixflow.metering.spend import BudgetPeriod, OpenJournal, SpendView
from helixflow.rpc.errors import from_rpc_error
from helixflow.rpc.generated.auth_v1 import metering_pb2, metering_pb2_grpc

TIMEOUT_S: Final = 2.0
# A transaction of two thousand rows, on a database that is busy. Sent again it changes nothing.
SHIP_TIMEOUT_S: Final = 15.0


class LedgerClient:
    """Calls `MeteringService`; implements `SpendReader`. The channel is the caller's to close.

    Every method raises the `HelixError` of the service; UNAVAILABLE when it does not answer in time.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = metering_pb2_grpc.MeteringServiceStub(channel)

    async def read(self, periods: Sequence[BudgetPeriod]) -> SpendView:
        """What was spent in `periods`, and all open journals: one consistent view."""
        request = metering_pb2.ReadSpendRequest(queries=[_query(period) for period in periods])
        answer = await _ask(self._stub.ReadSpend, request, TIMEOUT_S)
        if len(answer.spent) != len(periods):
            raise HelixError(ErrorKind.UPSTREAM_INVALID, "The ledger has not answered all that it was asked.")
        journals = {state.journal_id: OpenJournal(state.node_id, state.position) for state in answer.open_journals}
        return SpendView(tuple(answer.spent), journals)

    async def open_journal(self, journal_id: str, node_id: str, opened_at_ms: int) -> None:
        """Announces a journal: from now on it is open, until it is shipped to its end."""
        request = metering_pb2.OpenJournalRequest(journal_id=journal_id, node_id=node_id, opened_at_ms=opened_at_ms)
        await _ask(self._stub.OpenJournal, request, TIMEOUT_S)

    async def ship(self, node_id: str, shipment: Shipment) -> int:
        """Hands over a shipment; the position that the ledger has once it is committed."""
        request = metering_pb2.ShipRecordsRequest(
            journal_id=shipment.journal_id,
            node_id=node_id,
            rows=shipment.rows,
            position=shipment.position,
            closes=shipment.closes,
            quarantined=shipment.quarantined,
        )
        answer = await _ask(self._stub.ShipRecords, request, SHIP_TIMEOUT_S)
        return int(answer.position)


async def _ask(method: Any, request: Any, timeout_s: float) -> Any:
    try:
        return await method(request, timeout=timeout_s)
    except grpc.RpcError as exc:
        error = from_rpc_error(exc)
        if error.kind is ErrorKind.DEADLINE:
            error = HelixError(ErrorKind.UNAVAILABLE, "The ledger does not answer. Try again.")
        raise error from exc


def _query(period: BudgetPeriod) -> metering_pb2.SpendQuery:
    budget = period.budget
    return metering_pb2.SpendQuery(
        budget_id=budget.id,
        scope=metering_pb2.Scope.Value(f"SCOPE_{budget.scope.name}"),
        subject_id=budget.subject_id,
        organisation_id=budget.organisation_id,
        unit=metering_pb2.BudgetUnit.Value(f"BUDGET_UNIT_{budget.unit.name}"),
        from_ms=period.from_ms,
        to_ms=period.to_ms,
    )
