"""Tokens/s through HelixFlow against the same llama.cpp process called directly, in turns."""

import asyncio
import json
import time

import uvloop

from benchmarks.bars.startup import DATA_DIR, MODELS, pull_model
from benchmarks.report import Options, Result, median, spread
from benchmarks.targets import Target, chat_body, serve
from helixflow.clients.pool import PoolWatch
from helixflow.core.capacity import Replica
from helixflow.pki.identity import ServiceIdentity
from helixflow.rpc.channels import create_channel
from helixflow.rpc.sockets import socket_path
from helixflow.settings.tree import DEFAULT_CHAT_MODEL, Settings
from helixflow.transport.client import HttpClient, Timeouts, build_head
from helixflow.transport.origin import Origin

LIMIT = 0.97
CONCURRENCY = (1, 4, 8)
_QUESTION = "Write a long story about a lighthouse keeper and the sea."


def run(options: Options) -> list[Result]:
    pull_model()
    tokens = 64 if options.quick else 128
    with serve(MODELS, data_dir=DATA_DIR, pinned=False) as target:
        return uvloop.run(_measure(target, tokens, 3 if options.quick else 5))


async def _measure(target: Target, tokens: int, rounds: int) -> list[Result]:
    replica = await find_replica(target)
    ways = {"direct": (replica.port, replica.api_key), "through": (target.port, target.api_key)}
    client = HttpClient()
    results = []
    try:
        for way in ways.values():
            await _generate(client, *way, tokens, 1)
        for concurrency in CONCURRENCY:
            rates: dict[str, list[float]] = {name: [] for name in ways}
            for number in range(rounds):
                # Alternating who goes first cancels a drift of the machine.
                for name in list(ways) if number % 2 else list(reversed(ways)):
                    rates[name].append(await _generate(client, *ways[name], tokens, concurrency))
            ratio = median(rates["through"]) / median(rates["direct"])
            detail = "; ".join(
                f"{name} {median(values):.0f} tokens/s ({spread(values)})" for name, values in rates.items()
            )
            metric = f"tokens/s against direct, {concurrency} at once"
            results.append(Result("engine_efficiency", metric, ratio, "×", LIMIT, at_least=True, detail=detail))
    finally:
        await client.close()
    return results


async def find_replica(target: Target) -> Replica:
    """The running engine's address and key, as the pool tells every gateway."""
    assert target.data_dir is not None
    identity = ServiceIdentity.open(Settings(data_dir=target.data_dir), "gateway")
    channel = create_channel(socket_path(target.data_dir / "run", "pool"), identity, "control")
    async with asyncio.timeout(120), channel:
        found: asyncio.Future[Replica] = asyncio.get_running_loop().create_future()

        def look() -> None:
            for view in watch.views.values():
                if view.replicas and not found.done():
                    found.set_result(view.replicas[0])

        watch = PoolWatch(channel, lambda _views: look())
        task = asyncio.create_task(watch.run())
        try:
            return await found
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _generate(client: HttpClient, port: int, key: str, tokens: int, concurrency: int) -> float:
    """Tokens a second of all streams together."""
    origin = Origin("http", "127.0.0.1", port)
    headers = [("content-type", "application/json"), ("authorization", f"Bearer {key}")]
    head = build_head("POST", "/v1/chat/completions", origin, headers)
    started = time.perf_counter()
    counts = await asyncio.gather(*(_stream(client, origin, head, tokens, index) for index in range(concurrency)))
    return sum(counts) / (time.perf_counter() - started)


async def _stream(client: HttpClient, origin: Origin, head: bytes, tokens: int, seed: int) -> int:
    body = chat_body(
        DEFAULT_CHAT_MODEL,
        _QUESTION,
        stream=True,
        max_tokens=tokens,
        temperature=0.7,
        seed=seed,
        stream_options={"include_usage": True},
    )
    response = await client.request(origin, head, body, timeouts=Timeouts())
    answer = await response.read_all(2**24)
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {answer[:300]!r}")
    usage = next(json.loads(line[6:])["usage"] for line in reversed(answer.split(b"\n")) if b'"usage":{' in line)
    count: int = usage["completion_tokens"]
    return count
