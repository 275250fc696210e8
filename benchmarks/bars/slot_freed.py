"""How long an engine goes on for a client that has left: while it writes, streamed or not, and while it reads."""

import asyncio
import json
import random
import time

import uvloop

from benchmarks.bars.engine_efficiency import find_replica
from benchmarks.bars.startup import DATA_DIR, MODELS, pull_model
from benchmarks.load import http_request
from benchmarks.report import Options, Result, median
from benchmarks.targets import Target, chat_body, serve
from helixflow.settings.tree import DEFAULT_CHAT_MODEL
from helixflow.transport.client import HttpClient, Timeouts, build_head
from helixflow.transport.origin import Origin

# While it writes. While it reads, the batch that it is reading comes to its end first: reported.
LIMIT_MS = 200
_WORDS = ("river", "stone", "cloud", "paper", "window", "garden", "silver", "market", "signal", "orange")
_PROMPT_WORDS = 1200
# Into the reading of such a prompt.
_READING_S = 0.3
_TIMEOUT_S = 60.0


class Engine:
    """The engine itself, asked directly."""

    def __init__(self, client: HttpClient, port: int, key: str) -> None:
        self._client = client
        self._origin = Origin("http", "127.0.0.1", port)
        self._head = build_head("GET", "/slots", self._origin, [("authorization", f"Bearer {key}")])

    async def is_busy(self) -> bool:
        response = await self._client.request(self._origin, self._head, b"", timeouts=Timeouts())
        slots = json.loads(await response.read_all(2**24))
        return any(slot["is_processing"] for slot in slots)

    async def until_busy(self, wanted: bool) -> None:
        async with asyncio.timeout(_TIMEOUT_S):
            while await self.is_busy() is not wanted:
                await asyncio.sleep(0.002)


def run(options: Options) -> list[Result]:
    pull_model()
    with serve(MODELS, data_dir=DATA_DIR, pinned=False) as target:
        return uvloop.run(_measure(target, 8 if options.quick else 40))


async def _measure(target: Target, rounds: int) -> list[Result]:
    replica = await find_replica(target)
    client = HttpClient()
    engine = Engine(client, replica.port, replica.api_key)
    kinds = {
        "writing, streamed": (True, False),
        "writing, not streamed": (False, False),
        "reading a long prompt": (True, True),
    }
    results = []
    try:
        for kind, (stream, reading) in kinds.items():
            times_ms = sorted([await _leave(target, engine, stream=stream, reading=reading) for _ in range(rounds)])
            results.append(
                Result(
                    "slot_freed",
                    f"{kind}: until the slot is free, p95",
                    times_ms[round(0.95 * (rounds - 1))],
                    "ms",
                    None if reading else LIMIT_MS,
                    detail=f"p50 {median(times_ms):.0f}, worst {times_ms[-1]:.0f} of {rounds}",
                )
            )
    finally:
        await client.close()
    return results


async def _leave(target: Target, engine: Engine, *, stream: bool, reading: bool) -> float:
    """Milliseconds from the end of the client's connection until the engine has nothing to do."""
    await engine.until_busy(False)
    question = " ".join(random.choices(_WORDS, k=_PROMPT_WORDS)) if reading else "Count from one to one thousand."
    body = chat_body(DEFAULT_CHAT_MODEL, question, stream=stream, max_tokens=1500, logit_bias={"2": -100})
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
    try:
        writer.write(http_request(target.port, body, target.api_key))
        await engine.until_busy(True)
        if reading:
            await asyncio.sleep(_READING_S)
        elif stream:
            await reader.readuntil(b'"content":"')
            await reader.readuntil(b'"content":"')
        else:
            await asyncio.sleep(1.0)
    finally:
        left = time.perf_counter()
        writer.close()
    await engine.until_busy(False)
    return (time.perf_counter() - left) * 1000
