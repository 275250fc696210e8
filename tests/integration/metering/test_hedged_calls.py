"""A hedged call in a real node: what both deployments charge is reserved, charged and can be rated again."""

import asyncio
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks.processes import serving
from tests.harness.metering import chat_body
from tests.harness.node import CHAT, WAIT_S, Node, run_node
from tests.harness.visitor import Visitor, visit

HEDGE_AFTER_S = 0.2
# Dollars for a million tokens.
RATES = {"m/silent": {"input": "1000", "output": "0"}, "m/quick": {"input": "10", "output": "100"}}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with serving("benchmarks.mock_upstream") as (_, port):
        config = tmp_path / "hedged.toml"
        config.write_text(
            f'[[models]]\nname = "m"\nhedge_after_s = {HEDGE_AFTER_S}\n'
            + "".join(
                f'[[models.deployments]]\nengine = "openai"\nname = "{name}"\nmodel = "{upstream}"\ntier = {tier}\n'
                f'base_url = "http://127.0.0.1:{port}/v1"\ncontext = 1000\n'
                for tier, (name, upstream) in enumerate((("silent", "mock-silent"), ("quick", "mock")))
            )
        )
        with run_node(tmp_path / "data", HELIXFLOW_CONFIG=str(config)) as node:
            yield node


async def explain_one(operator: Visitor, number: int, body: dict[str, Any]) -> dict[str, Any]:
    """Makes the call, and tells what the ledger knows of it."""
    name = f"hedged-{number}"
    answer = await operator.ask("POST", CHAT, body, x_request_id=name)
    assert answer.status_code == 200
    assert answer.headers["x-helixflow-deployment"] == "m/quick"
    async with asyncio.timeout(WAIT_S):
        while (found := await operator.admin("GET", f"/requests/{name}/explain")).status_code != 200:
            await asyncio.sleep(0.05)
    explained: dict[str, Any] = found.json()
    return explained


async def test_the_loser_is_reserved_for_charged_and_told_of(node: Node) -> None:
    body = chat_body("m", stream=True, max_tokens=40)
    async with visit(node) as operator:
        for deployment, rates in RATES.items():
            await operator.make("/prices", {"subject_kind": "deployment", "subject": deployment, "rates": rates})
        await operator.make("/budgets", {"scope": "organisation", "unit": "money", "period": "day", "cap": "100"})
        for number in range(20):
            explained = await explain_one(operator, number, body)
            if explained["priced"]["source"] == "set" and explained["limited"]["policies"]:
                break  # prices and budget have reached the gateway
        checked = (await operator.admin("GET", "/prices/check")).text
    assert explained["retried"] == [{"deployment": "m/silent", "error": "hedged"}]
    priced = explained["priced"]
    assert (priced["prompt_tokens"], priced["completion_tokens"]) == (24, 31), "those of the answer"
    own = (24 * Decimal(10) + 31 * Decimal(100)) / 10**6
    # Nobody said how long its prompt was: a token for every four bytes of the request.
    losers_tokens = (Decimal(priced["cost"]) - own) * 10**6 / 1000
    assert abs(losers_tokens - len(msgspec.json.encode(body)) // 4) <= 2
    assert Decimal(explained["limited"]["reserved_cost"]) > 2 * len(msgspec.json.encode(body)) * Decimal("0.001")
    last = msgspec.json.decode(checked.strip().rpartition("\n")[2])
    assert (last["rows"], last["differing"]) == (number + 1, 0)
