import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering import ledger_client
from helixflow.metering.ledger_client import LedgerClient
from helixflow.metering.policies import Budget, Period, Scope, Unit
from helixflow.metering.shipping.shipments import Shipment
from helixflow.metering.spend import BudgetPeriod
from helixflow.rpc.channels import target_of
from helixflow.rpc.generated.auth_v1 import metering_pb2
from tests.harness.scripted_ledger import ScriptedLedger, serving

JOURNAL, NODE = "a" * 24, "0" * 16


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[LedgerClient]:
    options = [("grpc.default_authority", "localhost")]
    async with grpc.aio.insecure_channel(target_of(tmp_path / "ledger.sock"), options=options) as channel:
        yield LedgerClient(channel)


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[ScriptedLedger]:
    ledger = ScriptedLedger()
    async with serving(ledger, tmp_path / "ledger.sock"):
        yield ledger


async def test_spend_and_open_journals_are_read_in_the_order_asked_for(
    client: LedgerClient, ledger: ScriptedLedger
) -> None:
    project = Budget("b1", "org", Scope.PROJECT, "proj", Unit.TOKENS, Period.DAY, 1000)
    key = Budget("b2", "org", Scope.KEY, "key", Unit.MONEY, Period.TOTAL, 10**12)
    ledger.spend |= {"b1": 5, "b2": 7}
    await client.open_journal(JOURNAL, NODE, 1_790_000_000_000)
    assert await client.ship(NODE, Shipment(JOURNAL, 77)) == 77
    view = await client.read([BudgetPeriod(key, 0, 0), BudgetPeriod(project, 86_400_000, 172_800_000)])
    assert view.spent == (7, 5)
    assert {name: (one.node_id, one.position) for name, one in view.open_journals.items()} == {JOURNAL: (NODE, 77)}
    assert ledger.queries == [
        metering_pb2.SpendQuery(
            budget_id="b2",
            scope=metering_pb2.SCOPE_KEY,
            subject_id="key",
            organisation_id="org",
            unit=metering_pb2.BUDGET_UNIT_MONEY,
        ),
        metering_pb2.SpendQuery(
            budget_id="b1",
            scope=metering_pb2.SCOPE_PROJECT,
            subject_id="proj",
            organisation_id="org",
            unit=metering_pb2.BUDGET_UNIT_TOKENS,
            from_ms=86_400_000,
            to_ms=172_800_000,
        ),
    ]


async def test_errors_are_those_of_the_ledger(client: LedgerClient, ledger: ScriptedLedger) -> None:
    ledger.refused = {JOURNAL}
    with pytest.raises(HelixError) as caught:
        await client.ship(NODE, Shipment(JOURNAL, 1))
    assert (caught.value.kind, caught.value.param) == (ErrorKind.INVALID_VALUE, "rows")


async def test_a_ledger_that_is_down_or_silent_is_unavailable(
    client: LedgerClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HelixError) as caught:
        await client.read([])
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    monkeypatch.setattr(ledger_client, "TIMEOUT_S", 0.2)
    silent = await asyncio.start_unix_server(lambda *_: None, tmp_path / "ledger.sock")
    async with silent:
        with pytest.raises(HelixError) as caught:
            await client.read([])
    assert caught.value.kind is ErrorKind.UNAVAILABLE
