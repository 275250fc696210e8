"""Nothing is left of requests: 200 of all kinds, and every process is as it was before."""

import asyncio
from collections.abc import Awaitable, Callable

import psutil

from tests.harness.node import CHAT, CHAT_MODEL, EMBEDDING_MODEL, EMBEDDINGS, Node, eventually
from tests.harness.wire import request

TOGETHER = 40
ROUNDS = 5


async def answered(node: Node) -> None:
    assert (await node.chat("Hi", max_tokens=2)).status == 200


async def streamed(node: Node) -> None:
    assert (await node.chat("Hi", max_tokens=2, stream=True)).events[-1] == b"[DONE]"


async def embedded(node: Node) -> None:
    body = {"model": EMBEDDING_MODEL, "input": ["a", "b"]}
    assert (await node.ask("POST", EMBEDDINGS, body)).status == 200


async def refused(node: Node) -> None:
    assert (await node.chat(model="nowhere")).status == 404
    assert (await node.chat(max_tokens=10**6)).status == 400


async def without_a_key(node: Node) -> None:
    async with await node.connect() as wire:
        assert (await wire.ask(request("POST", CHAT, b"{}"))).status == 401


async def left_while_streaming(node: Node) -> None:
    wire = await node.connect()
    wire.send(node.endless_request("Hi"))
    assert (await wire.read_head()).status == 200
    wire.drop()


async def left_before_an_answer(node: Node) -> None:
    wire = await node.connect()
    wire.send(node.endless_request("Hi", stream=False))
    await node.ask("GET", "/livez")
    wire.drop()


async def left_within_the_body(node: Node) -> None:
    wire = await node.connect()
    wire.send(node.chat_request()[:-5])
    await node.ask("GET", "/livez")
    wire.drop()


KINDS: list[Callable[[Node], Awaitable[None]]] = [
    answered, streamed, embedded, refused, without_a_key,
    left_while_streaming, left_before_an_answer, left_within_the_body,
]  # fmt: skip


def descriptors(node: Node) -> dict[int, int]:
    return {process.pid: process.num_fds() for process in node.tree()}


async def test_two_hundred_requests_leave_nothing(node: Node) -> None:
    for kind in KINDS:
        await kind(node)
    # Connections to engines are closed after some idle seconds.
    gateway = node.find("helixflow.launch.gateway")
    await eventually(lambda: not _to_engines(gateway))
    before = descriptors(node)
    threads = gateway.num_threads()
    for _ in range(ROUNDS):
        await asyncio.gather(*(KINDS[index % len(KINDS)](node) for index in range(TOGETHER)))
    await node.until_metric(1, "helixflow_requests_in_flight")  # the one that asks
    await node.until_metric(0, "helixflow_slots_busy")
    await node.until_metric(0, "helixflow_queue_requests")
    for model in (CHAT_MODEL, EMBEDDING_MODEL):
        await eventually(lambda model=model: node.engine(model).busy_slots == 0)
    await eventually(lambda: not _to_engines(gateway))
    assert descriptors(node).keys() == before.keys(), "processes came or went"
    # The pool's own look at its engines may be under way at any one moment.
    await eventually(lambda: all(count <= before[pid] for pid, count in descriptors(node).items()))
    assert gateway.num_threads() <= threads + 8
    log = node.err.read_text()
    assert "never retrieved" not in log
    assert "Task was destroyed" not in log


def _to_engines(gateway: psutil.Process) -> list[object]:
    """The gateway's connections as a client."""
    own = {c.laddr.port for c in gateway.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    return [c for c in gateway.net_connections("tcp") if c.raddr and c.laddr.port not in own]
