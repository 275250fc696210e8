"""kill -9 on each process of a running node in turn, while it works."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import psutil

from helixflow.core.keys import generate_key
from tests.harness.node import CHAT_MODEL, WAIT_S, Node, eventually
from tests.harness.visitor import visit
from tests.harness.wire import Answer, Wire, request

DEPLOYMENT = f"{CHAT_MODEL}/llama_cpp-0"
ENGINE = "helixflow.engines.llama_cpp.child"
CONTROL = "helixflow.launch.control"
GATEWAY = "helixflow.launch.gateway"


async def begin(node: Node, text: str = "Count from one to a thousand.", **fields: object) -> tuple[Wire, Answer]:
    """A stream that has begun to talk."""
    wire = await node.connect()
    wire.send(node.endless_request(text, **fields))
    answer = await wire.read_head()
    assert answer.status == 200
    for _ in range(4):
        chunk = await wire.read_chunk()
        assert chunk
        answer.pieces.append(chunk)
    return wire, answer


async def finish(wire: Wire, answer: Answer) -> None:
    while chunk := await wire.read_chunk():
        answer.pieces.append(chunk)
    answer.complete = chunk is not None


async def test_an_engine_killed_mid_stream(node: Node) -> None:
    """Plain text goes on elsewhere, see test_resume_chaos; with log-probabilities it cannot, and says so."""
    restarts = await node.metric("helixflow_engine_restarts_total", deployment=DEPLOYMENT)
    killed = node.find(ENGINE)
    wire, answer = await begin(node, logprobs=True)
    killed.kill()
    await finish(wire, answer)
    assert answer.complete, "the stream ends as HTTP wants it"
    assert b"[DONE]" not in answer.body
    last = json.loads(answer.events[-1])["error"]
    assert set(last) == {"message", "type", "param", "code"}
    assert last["code"] == "upstream_unavailable"
    wire.send(node.chat_request(max_tokens=4))
    following = await wire.read()
    assert following.status == 200, "the same connection, after the restart"
    await node.until_metric(restarts + 1, "helixflow_engine_restarts_total", deployment=DEPLOYMENT)
    assert node.find(ENGINE).pid != killed.pid
    wire.drop()
    (record,) = await eventually(lambda: [r for r in node.records("request") if r["error"] == last["code"]])
    assert record["completion_tokens"] >= 3


async def test_an_engine_killed_before_it_answers(node: Node) -> None:
    """The client hears of it at once, or gets its answer from the next engine; never silence."""
    killed = node.find(ENGINE)
    async with await node.connect() as wire:
        wire.send(node.chat_request("river stone paper cloud " * 150, max_tokens=2))
        engine = node.engine()
        await eventually(lambda: engine.busy_slots == 1)
        killed.kill()
        answer = await wire.read()
    assert answer.status in (200, 502), answer.body
    assert (await node.chat()).status == 200


async def test_control_killed_under_load(node: Node) -> None:
    async with visit(node) as operator:
        before = (await operator.new_key("before")).credential
    assert (await node.chat(key=before)).status == 200
    engine, control, gateway = node.find(ENGINE), node.find(CONTROL), node.find(GATEWAY)
    wire, _ = await begin(node)
    control.kill()
    control.wait(WAIT_S)
    for key in (node.key, before):
        during = await node.chat(key=key)
        assert during.status == 200, "cached keys work without control"
    assert await wire.read_chunk(), "a stream under way goes on"
    wire.drop()
    await eventually(lambda: node.records("replica.adopted"))
    # The gateway finds control again a moment later; until then a key that it does not know is a 503.
    await eventually(lambda: [r for r in node.records("watch.restored") if r["watch"] == "changes"])
    async with visit(node) as operator:
        after = (await operator.new_key("after")).credential
    assert (await node.chat(key=after)).status == 200
    async with await node.connect() as other:
        assert (await other.ask(request("GET", "/v1/models", key=generate_key()))).status == 401
    assert (node.find(ENGINE).pid, node.find(GATEWAY).pid) == (engine.pid, gateway.pid)
    assert node.find(CONTROL).pid != control.pid


async def test_a_gateway_killed_under_load(node: Node) -> None:
    """Its streams break, but nobody who comes meanwhile is refused."""
    engine, gateway = node.find(ENGINE), node.find(GATEWAY)
    wire, _ = await begin(node)
    gateway.kill()
    gateway.wait(WAIT_S)  # until then it may still accept somebody
    statuses = await asyncio.gather(*((node.ask("GET", "/v1/models")) for _ in range(20)))
    assert {answer.status for answer in statuses} == {200}
    assert b"[DONE]" not in await wire.closed()
    wire.drop()
    assert (await node.chat()).status == 200
    assert node.find(GATEWAY).pid != gateway.pid
    assert node.find(ENGINE).pid == engine.pid
    await eventually(lambda: node.engine().busy_slots == 0)


async def test_the_launcher_killed_under_load(start_node: Callable[..., Node]) -> None:
    node = start_node()
    wire, _ = await begin(node)
    assert len(node.tree()) == 5
    port = node.port
    node.process.kill()
    # The kernel does it, at once: on a quiet machine nothing is left after a tenth of a second.
    await eventually(lambda: not node.tree(), 10)
    await wire.closed()
    wire.drop()

    def listeners() -> list[Any]:
        return [c for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port]

    # The kernel closes sockets that were on their way between processes a moment later.
    await eventually(lambda: not listeners(), 10)
