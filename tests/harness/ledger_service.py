"""The real ledger as the shipper reaches it, without the rest of the auth service."""

from typing import Any

from helixflow.auth.ledger.ledger import Ledger
from helixflow.rpc.generated.auth_v1 import metering_pb2_grpc


class LedgerService(metering_pb2_grpc.MeteringServiceServicer):
    """Serve it with `scripted_ledger.serving`."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def OpenJournal(self, request: Any, context: Any) -> Any:
        return await self._ledger.open_journal(request)

    async def ShipRecords(self, request: Any, context: Any) -> Any:
        return await self._ledger.ship_records(request)

    async def ReadSpend(self, request: Any, context: Any) -> Any:
        return await self._ledger.read_spend(request)
