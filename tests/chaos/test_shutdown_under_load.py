"""SIGTERM and SIGINT while answers are under way."""

import asyncio
import signal
from collections.abc import Callable

import pytest

from tests.harness.node import WAIT_S, Node, eventually
from tests.harness.wire import LIMIT_S


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_running_answers_finish_and_new_requests_are_refused(
    start_node: Callable[..., Node], number: signal.Signals
) -> None:
    node = start_node()
    streamed, whole, idle = [await node.connect() for _ in range(3)]
    streamed.send(node.endless_request("Count to a hundred.", max_tokens=150))
    whole.send(node.endless_request("Count to a thousand.", max_tokens=150, stream=False))
    answer = await streamed.read_head()
    engine = node.engine()
    await eventually(lambda: engine.busy_slots == 2)
    node.process.send_signal(number)
    await eventually(lambda: node.records("launcher.stopping"))
    async with asyncio.timeout(LIMIT_S):
        while (refused := await idle.ask(node.chat_request())).status == 200:
            pass
    assert refused.status == 503
    assert refused.error["code"] == "shutting_down"
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.headers["connection"] == "close"
    while chunk := await streamed.read_chunk():
        answer.pieces.append(chunk)
    assert answer.events[-1] == b"[DONE]"
    finished = await whole.read()
    assert finished.status == 200
    assert finished.json["usage"]["completion_tokens"] == 150
    assert await asyncio.to_thread(node.process.wait, WAIT_S) == 0
    await eventually(lambda: not node.tree())
    left = [path.name for path in (node.data_dir / "run").iterdir() if path.name != "serve.lock"]
    assert left == []
    for wire in (streamed, whole, idle):
        wire.drop()
    with pytest.raises(ConnectionRefusedError):
        await node.connect()


async def test_a_stream_that_does_not_end_is_cut_off_after_the_drain_timeout(start_node: Callable[..., Node]) -> None:
    node = start_node(HELIXFLOW_GATEWAY__DRAIN_TIMEOUT_S="1")
    wire = await node.connect()
    wire.send(node.endless_request())
    await wire.read_head()
    node.process.terminate()
    assert await asyncio.to_thread(node.process.wait, 30) == 0
    assert b"[DONE]" not in await wire.closed()
    wire.drop()
    await eventually(lambda: not node.tree())
