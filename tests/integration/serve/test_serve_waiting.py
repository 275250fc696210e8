"""Requests that wait for a slot of a real engine, as clients and operators see them."""

import asyncio
from contextlib import AsyncExitStack

from helixflow.pki.identity import ServiceIdentity
from helixflow.rpc.channels import create_channel
from helixflow.rpc.generated.pool_v1 import pool_pb2, pool_pb2_grpc
from helixflow.settings.tree import Settings
from tests.harness.node import CHAT_MODEL, WAIT_S, Node, eventually

DEPLOYMENT = f"{CHAT_MODEL}/llama_cpp-0"


async def busy_in_the_pool(node: Node) -> int:
    """Slots in use over all gateways, as the pool knows it."""
    identity = ServiceIdentity.open(Settings(data_dir=node.data_dir), "gateway")
    async with create_channel(node.data_dir / "run" / "pool.sock", identity, "control") as channel:
        answer = await pool_pb2_grpc.PoolServiceStub(channel).ListModels(pool_pb2.ListModelsRequest(), timeout=WAIT_S)
    return sum(one.busy for deployment in answer.deployments for one in deployment.replicas)


async def test_who_finds_all_slots_taken_waits_and_is_served_when_one_is_free(node: Node) -> None:
    slots = node.engine().replica.slots
    async with AsyncExitStack() as stack:
        wires = [await node.connect() for _ in range(slots)]
        for number, wire in enumerate(wires):
            stack.callback(wire.drop)
            wire.send(node.endless_request(f"Count from {number}."))
        async with asyncio.timeout(WAIT_S):
            while await node.metric("helixflow_slots_busy") < slots or await busy_in_the_pool(node) < slots:
                await asyncio.sleep(0.05)
        waited = await node.metric("helixflow_queue_wait_seconds_count", deployment=DEPLOYMENT)
        waiting = asyncio.create_task(node.chat())
        await node.until_metric(1, "helixflow_queue_first_place", deployment=DEPLOYMENT)
        assert await node.metric("helixflow_queue_requests", deployment=DEPLOYMENT) == 1
        # Another one that cannot wait is told when to come back.
        async with await node.connect() as wire:
            hurried = node.chat_request("Quick.").replace(b"\r\n", b"\r\nx-helixflow-timeout-ms: 300\r\n", 1)
            refused = await wire.ask(hurried)
        assert refused.status == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert await node.metric("helixflow_queue_refusals_total", deployment=DEPLOYMENT) >= 1
        wires[0].drop()
        assert (await waiting).status == 200
        await node.until_metric(waited + 1, "helixflow_queue_wait_seconds_count", deployment=DEPLOYMENT)
    await eventually(lambda: node.engine().busy_slots == 0)
    async with asyncio.timeout(WAIT_S):
        while await busy_in_the_pool(node):
            await asyncio.sleep(0.05)
