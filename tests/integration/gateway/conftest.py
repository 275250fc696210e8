"""Gateways for wire tests, under the event loop of production."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pytest
import uvloop

from tests.harness.gateway import RunningGateway, provider, run_gateway


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
async def idle_gateway(tmp_path: Path) -> AsyncIterator[RunningGateway]:
    """A gateway whose one model, `m`, has an upstream that cannot be reached; short deadlines."""
    async with run_gateway(
        tmp_path,
        {"m": [provider("http://127.0.0.1:9/v1")], "org/m:1": [provider("http://127.0.0.1:9/v1")]},
        max_body_bytes=4096,
        max_header_bytes=8192,
        header_timeout_s=1,
        body_timeout_s=1,
    ) as gateway:
        yield gateway
