"""The audit log of a real node through the command line."""

import asyncio
import json
from pathlib import Path

from tests.harness.node import Node
from tests.harness.visitor import visit


async def test_an_act_is_listed_exported_and_verified(node: Node, tmp_path: Path) -> None:
    async with visit(node) as operator:
        key_id = (await operator.make("/keys", {"name": "for the audit log"}))["key"]["id"]
    listed = json.loads(await helixflow(node, "list", "--target", key_id, "--json"))["records"]
    assert [record["action"] for record in listed] == ["create_key"]
    assert "create_key" in await helixflow(node, "list", "--since", "1h", "--action", "create_key")
    out = tmp_path / "audit.jsonl"
    assert await helixflow(node, "export", "--out", str(out)) == ""
    assert listed[0]["hash"] in out.read_text()
    assert (await helixflow(node, "verify", str(out))).startswith("verified: records 1 to ")
    installation = await helixflow(node, "export", "--installation")
    assert json.loads(installation.splitlines()[0])["organisation_id"] == ""


async def helixflow(node: Node, *words: str) -> str:
    """What `helixflow audit` printed."""
    done = await asyncio.to_thread(node.run, "audit", *words)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout
