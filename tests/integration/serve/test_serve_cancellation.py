"""A client that leaves frees its slot, seen in the engine itself, with the settings of the product."""

import asyncio
import time

import pytest

from tests.harness.engine import RunningEngine
from tests.harness.node import WAIT_S, Node, eventually
from tests.harness.wire import Wire

# Far from the minutes that these answers take otherwise, and from what a quiet machine needs (0.1 s, and 2 s).
DECODING_LIMIT_S = 10.0
# The engine tries to tell its progress after each step of prefill, and ends the next one before it looks again.
PREFILL_LIMIT_S = 30.0
LONG_PROMPT = "alpha river stone engine cloud paper window garden silver market signal orange " * 60


async def leave(wire: Wire, engine: RunningEngine) -> float:
    """Seconds from the client's end to idle slots."""
    left = time.monotonic()
    wire.drop()
    while await asyncio.to_thread(lambda: engine.busy_slots):
        assert time.monotonic() - left < WAIT_S
    return time.monotonic() - left


@pytest.mark.parametrize("stream", [True, False])
async def test_while_tokens_are_made(node: Node, stream: bool) -> None:
    engine = node.engine()
    wire = await node.connect()
    steps = engine.metric("llamacpp:n_decode_total")
    wire.send(node.endless_request(f"Count from one to a thousand. {stream}", stream=stream))
    await eventually(lambda: engine.metric("llamacpp:n_decode_total") > steps + 8)
    assert engine.busy_slots == 1
    assert await leave(wire, engine) < DECODING_LIMIT_S
    await eventually(lambda: [r["stream"] for r in node.records("request") if r["status"] == 499][-1:] == [stream])
    await node.until_metric(0, "helixflow_slots_busy")


@pytest.mark.parametrize("stream", [True, False])
async def test_while_the_prompt_is_read(node: Node, stream: bool) -> None:
    engine = node.engine()
    wire = await node.connect()
    wire.send(node.endless_request(f"{stream} {LONG_PROMPT}", stream=stream))
    await eventually(lambda: engine.busy_slots == 1)
    assert await leave(wire, engine) < PREFILL_LIMIT_S
    await node.until_metric(0, "helixflow_slots_busy")
