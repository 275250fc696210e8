"""A gateway before a real engine, for official SDKs: it serves from a thread, so that synchronous clients work too."""

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import uvloop

from helixflow.pool.store import StoredModel
from tests.harness.engine import RunningEngine, run_engine
from tests.harness.gateway import local, provider, run_gateway

CONTEXT = 2048
SLOTS = 2


@dataclass(frozen=True, slots=True)
class Served:
    """Where the gateway listens. Models: `org/tiny:1` on the engine, `broken` and `busy` on upstreams that fail."""

    base_url: str
    key: str
    port: int
    engine: RunningEngine


@pytest.fixture(scope="session")
def engine(chat_model: StoredModel) -> Iterator[RunningEngine]:
    deployment = local(context=CONTEXT, parallel=SLOTS, batch_size=64, threads=1, prompt_cache_mib=64)
    with run_engine(deployment, chat_model.path) as running:
        yield running


@pytest.fixture(scope="session")
def served(engine: RunningEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    data_dir = tmp_path_factory.mktemp("gateway")
    box: list[Served] = []
    ready = threading.Event()
    loop = uvloop.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        models = {"org/tiny:1": [local()], "loading": [local()], "broken": [provider("http://127.0.0.1:9/v1")]}
        async with run_gateway(data_dir, models, max_body_bytes=100_000, load_wait_s=0.1) as gateway:
            gateway.show("org/tiny:1/llama_cpp-0", "ready", engine.replica)
            gateway.show("loading/llama_cpp-0", "loading", retry_after_s=3)
            box.append(Served(f"http://127.0.0.1:{gateway.port}/v1", gateway.key, gateway.port, engine))
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(60)
    yield box[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(60)
    loop.close()
