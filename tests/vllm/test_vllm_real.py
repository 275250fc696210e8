"""A real vLLM behind a real node: opt-in, `make test-vllm`. Loading takes minutes on a CPU."""

import concurrent.futures
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai import OpenAI

from helixflow.core.capacity import Replica
from helixflow.pki.identity import ServiceIdentity
from helixflow.pool.manifest import StoredModel
from helixflow.rpc.channels import create_blocking_channel
from helixflow.rpc.generated.pool_v1 import pool_pb2, pool_pb2_grpc
from helixflow.settings.tree import Settings
from tests.harness.engine import RunningEngine
from tests.harness.node import Node, run_node, until

PYTHON = os.environ.get("VLLM_PYTHON", "")
ROOT = Path(__file__).parents[2]
LOAD_S = 900.0
FREED_S = 10.0
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France? Answer in one sentence please."}]
STORY: list[Any] = [{"role": "user", "content": "Tell me a story about a dragon."}]

pytestmark = pytest.mark.skipif(not PYTHON, reason="make test-vllm")


@pytest.fixture(scope="module")
def model_folder(request: pytest.FixtureRequest) -> Path:
    """SmolLM2 as safetensors: `VLLM_MODEL`, or converted once from the test machine's GGUF file."""
    if given := os.environ.get("VLLM_MODEL"):
        return Path(given)
    folder = ROOT / "build" / "vllm" / "model"
    if not (folder / "config.json").exists():
        model: StoredModel = request.getfixturevalue("chat_model")
        subprocess.run([PYTHON, ROOT / "tools" / "gguf_to_safetensors.py", model.path, folder], check=True)
    return folder


@pytest.fixture(scope="module")
def node(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Two replicas, loaded."""
    folder = tmp_path_factory.mktemp("vllm")
    config = folder / "helixflow.toml"
    on_cpu = 'dtype = "float32"\nextra_arguments = ["--enforce-eager"]' if not os.environ.get("VLLM_GPU") else ""
    config.write_text(
        f"""
[[models]]
name = "tiny"
[[models.deployments]]
engine = "vllm"
model = "{model_folder}"
python = "{PYTHON}"
replicas = 2
context = 2048
parallel = 8
gpu_memory_fraction = 0.3
cpu_kv_cache_gib = 1
{on_cpu}
"""
    )
    settings = {
        "HELIXFLOW_CONFIG": str(config),
        "HELIXFLOW_POOL__MEMORY_BYTES": str(64 << 30),
        "HELIXFLOW_GATEWAY__REQUEST_TIMEOUT_S": str(LOAD_S),
    }
    data = folder / "data"
    data.mkdir()
    began = time.monotonic()
    with run_node(data, ready_s=LOAD_S, **settings) as node:
        until(lambda: len(replicas(node)) == 2, LOAD_S)
        print(f"\ntwo replicas loaded in {time.monotonic() - began:.0f} s")
        yield node


@pytest.fixture
def client(node: Node) -> Iterator[OpenAI]:
    with OpenAI(api_key=node.key, base_url=f"http://127.0.0.1:{node.port}/v1", max_retries=0, timeout=300) as client:
        yield client


def replicas(node: Node) -> list[RunningEngine]:
    """Those that serve, asked directly."""
    identity = ServiceIdentity.open(Settings(data_dir=node.data_dir), "gateway")
    with create_blocking_channel(node.data_dir / "run" / "pool.sock", identity, "control") as channel:
        answer = pool_pb2_grpc.PoolServiceStub(channel).ListModels(pool_pb2.ListModelsRequest(), timeout=30)
    (deployment,) = answer.deployments
    return [
        RunningEngine(Replica(r.replica_id, r.host, r.port, r.api_key, r.slots, r.context), node.process)
        for r in deployment.replicas
    ]


def running(engine: RunningEngine) -> int:
    """Generations that it works at."""
    lines = engine.read("/metrics").decode().splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith("vllm:num_requests_running{"))


def stream(client: OpenAI, tokens: int, on_piece: Callable[[int], None] = lambda _count: None) -> tuple[str, int]:
    """Text and tokens of a greedy story."""
    chunks = client.chat.completions.create(
        model="tiny",
        messages=STORY,
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    text, used, pieces = "", 0, 0
    for chunk in chunks:
        if chunk.usage is not None:
            used = chunk.usage.completion_tokens
        for choice in chunk.choices:
            if choice.delta.content:
                pieces += 1
                text += choice.delta.content
                on_piece(pieces)
    return text, used


def test_it_answers(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=20, temperature=0)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.model == "tiny"
    completion = client.completions.create(model="tiny", prompt="The capital of France is", max_tokens=3, temperature=0)
    assert "Paris" in completion.choices[0].text


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_frees_its_slot(node: Node, streamed: bool) -> None:
    engines = replicas(node)
    with OpenAI(api_key=node.key, base_url=f"http://127.0.0.1:{node.port}/v1", max_retries=0) as client:
        options: dict[str, Any] = {"model": "tiny", "messages": STORY, "max_tokens": 1500}
        if streamed:
            chunks = client.chat.completions.create(**options, stream=True, extra_body={"ignore_eos": True})
            next(iter(chunks))
            chunks.close()
        else:
            with pytest.raises(Exception, match="timed out"):
                client.chat.completions.create(**options, timeout=3, extra_body={"ignore_eos": True})
    left = time.monotonic()
    until(lambda: not any(running(engine) for engine in engines), FREED_S)
    print(f"\nfree after {time.monotonic() - left:.2f} s (streamed: {streamed})")


def test_how_fast_it_is(client: OpenAI) -> None:
    for streams in (1, 8):
        began = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(streams) as threads:
            used = sum(tokens for _, tokens in threads.map(lambda _: stream(client, 64), range(streams)))
        print(f"\n{streams} streams: {used / (time.monotonic() - began):.1f} tokens/s")
        assert used == 64 * streams


def test_a_stream_outlives_its_replica_and_nothing_is_left_of_that(node: Node, client: OpenAI) -> None:
    undisturbed, used = stream(client, 48)
    killed: list[psutil.Process] = []

    def kill(pieces: int) -> None:
        if pieces != 10:
            return
        busy = next(engine for engine in replicas(node) if running(engine))
        (server,) = (
            process
            for process in node.tree()
            if "vllm.entrypoints.cli.main" in process.cmdline()
            and str(busy.replica.port) in process.cmdline()
            and "helixflow.process.family" not in process.cmdline()
        )
        killed.extend((server, *server.children(recursive=True)))
        assert len(killed) > 1, "vLLM has a process for its core"
        server.send_signal(signal.SIGKILL)

    text, tokens = stream(client, 48, kill)
    assert killed
    assert tokens == used
    assert text == undisturbed
    until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in killed), 10)
    (resumed,) = node.records("stream.resumed")
    print(f"\ngoes on after {resumed['tokens']} tokens")
