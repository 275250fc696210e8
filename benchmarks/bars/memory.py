"""The gateway process's memory: idle, for each open idle stream, and over many requests."""

import asyncio

import uvloop

from benchmarks import targets
from benchmarks.load import Load, http_request
from benchmarks.processes import rss_bytes
from benchmarks.report import Options, Result
from benchmarks.targets import Target

IDLE_LIMIT_MB = 90.0
STREAM_LIMIT_KB = 25.0
GROWTH_LIMIT_PERCENT = 5.0
STREAMS = 1000


def run(options: Options) -> list[Result]:
    total = 30_000 if options.quick else 300_000
    with targets.mock() as mock, targets.gateway(mock) as gateway:
        uvloop.run(_serve(gateway, 500))
        idle = rss_bytes(gateway.pid)
        per_stream = uvloop.run(_open_streams(gateway))
        warm = uvloop.run(_serve(gateway, total // 10))
        sizes = [warm] + [uvloop.run(_serve(gateway, total // 10)) for _ in range(9)]
    growth = max(abs(size - warm) for size in sizes) / warm * 100
    mb = [round(size / 1e6, 1) for size in sizes]
    return [
        Result("memory", "idle RSS", idle / 1e6, "MB", IDLE_LIMIT_MB),
        Result("memory", "RSS an idle stream", per_stream / 1e3, "KB", STREAM_LIMIT_KB, detail=f"{STREAMS} streams"),
        Result("memory", f"RSS change over {total:,} requests", growth, "%", GROWTH_LIMIT_PERCENT, detail=f"MB: {mb}"),
    ]


async def _serve(gateway: Target, count: int) -> int:
    """RSS in bytes after `count` more requests."""
    async with Load(gateway.port, http_request(gateway.port, gateway.chat_body(), gateway.api_key), 32) as load:
        while load.tally.answers < count:
            await asyncio.sleep(0.05)
            if load.tally.errors:
                raise RuntimeError(f"{load.tally.errors} errors: {load.tally.problem}")
    await asyncio.sleep(0.2)
    return rss_bytes(gateway.pid)


async def _open_streams(gateway: Target) -> float:
    """Bytes of RSS a stream that is open and silent."""
    before = rss_bytes(gateway.pid)
    body = gateway.chat_body("idle", stream=True)
    async with Load(gateway.port, http_request(gateway.port, body, gateway.api_key), STREAMS) as load:
        for _ in range(600):
            await asyncio.sleep(0.05)
            if all(requester.has_data for requester in load.requesters):
                break
        else:
            raise RuntimeError(f"not all idle streams began: {load.tally.problem}")
        await asyncio.sleep(1)
        return (rss_bytes(gateway.pid) - before) / STREAMS
