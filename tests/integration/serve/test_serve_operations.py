"""Running `helixflow serve` seen by its operator: keys, metrics and the request log."""

import asyncio
import json
import time

from tests.harness.node import CHAT_MODEL, HELIXFLOW, WAIT_S, Node, eventually
from tests.harness.visitor import EFFECTIVE_S
from tests.harness.wire import request

DIRECTIONS = ("prompt_tokens", "completion_tokens")


async def status_with(node: Node, key: str) -> int:
    async with await node.connect() as wire:
        return (await wire.ask(request("GET", "/v1/models", key=key))).status


async def test_a_key_lives_from_its_creation_to_a_second_after_its_revocation(node: Node) -> None:
    made = node.run("keys", "create", "laptop", "--json")
    assert made.returncode == 0, made.stderr
    created = json.loads(made.stdout)
    assert await status_with(node, created["key"]) == 200
    listed = {key["name"]: key for key in json.loads(node.run("keys", "list", "--json").stdout)["keys"]}
    assert listed["laptop"]["state"] == "valid"
    assert created["key"] not in json.dumps(listed)
    process = await asyncio.create_subprocess_exec(
        HELIXFLOW, "keys", "revoke", created["key_id"], env=node.environment, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert b"revoked laptop" in await process.stdout.readline()
    revoked = time.monotonic()
    while await status_with(node, created["key"]) != 401:
        assert time.monotonic() - revoked < EFFECTIVE_S, "a revoked key still works"
        await asyncio.sleep(0.01)
    assert await process.wait() == 0
    assert await status_with(node, node.key) == 200


async def test_metrics_count_what_was_served(node: Node) -> None:
    deployment = f"{CHAT_MODEL}/llama_cpp-0"
    wanted = {"operation": "chat/completions", "deployment": deployment, "status": "200"}

    async def read() -> list[float]:
        names = ("helixflow_requests_total", "helixflow_first_token_seconds_count", "helixflow_request_seconds_count")
        counts = [await node.metric(name, **wanted) for name in names]
        return counts + [await node.metric("helixflow_tokens_total", **wanted, direction=d) for d in ("in", "out")]

    before = await read()
    usage = (await node.chat(max_tokens=5)).json["usage"]
    wanted_after = [old + new for old, new in zip(before, (1, 1, 1, *map(usage.get, DIRECTIONS)), strict=True)]
    async with asyncio.timeout(WAIT_S):
        while await read() != wanted_after:
            await asyncio.sleep(0.02)
    assert await node.metric("helixflow_replicas", deployment=deployment) == 1
    assert await node.metric("helixflow_engine_restarts_total", deployment=deployment) == 0
    await node.until_metric(0, "helixflow_queue_requests", deployment=deployment)
    await node.until_metric(0, "helixflow_slots_busy", deployment=deployment)


async def test_requests_beyond_the_slots_wait_in_our_queue(node: Node) -> None:
    slots = node.engine().replica.slots
    wires = [await node.connect() for _ in range(slots + 2)]
    for index, wire in enumerate(wires):
        wire.send(node.endless_request(f"Count from {index}."))
    try:
        await node.until_metric(2, "helixflow_queue_requests", deployment=f"{CHAT_MODEL}/llama_cpp-0")
        assert await node.metric("helixflow_slots_busy") == slots
        await eventually(lambda: node.engine().busy_slots == slots)
    finally:
        for wire in wires:
            wire.drop()
    await eventually(lambda: node.engine().busy_slots == 0)
    await node.until_metric(0, "helixflow_queue_requests")


async def test_a_request_is_one_line_with_ids_model_tokens_and_times(node: Node) -> None:
    async with await node.connect() as wire:
        body = node.chat_request("Say hi.", max_tokens=3, stream=True)
        wire.send(body.replace(b"host: test", b"host: test\r\nx-request-id: mine-77"))
        assert (await wire.read()).status == 200
    (record,) = await eventually(lambda: [r for r in node.records("request") if r["request_id"] == "mine-77"])
    assert record["service"] == "gateway"
    assert (record["model"], record["deployment"]) == (CHAT_MODEL, f"{CHAT_MODEL}/llama_cpp-0")
    assert (record["status"], record["stream"], record["finish_reason"]) == (200, True, "length")
    assert record["prompt_tokens"] > 3
    assert record["completion_tokens"] == 3
    assert 0 < record["first_token_s"] <= record["duration_s"]
    assert record["call_id"] not in ("", "mine-77")
    assert record["key_id"].startswith("key_")
    assert record["project"]


async def test_where_auth_listens_is_told(node: Node) -> None:
    address = (node.data_dir / "run" / "auth.address").read_text()
    (told,) = node.records("auth.serving")
    assert f"{told['host']}:{told['port']}" == address
    _, writer = await asyncio.open_connection(told["host"], told["port"])
    writer.close()
