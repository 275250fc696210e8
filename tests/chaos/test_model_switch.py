"""Two models that do not fit together, asked in turn: no request fails, and nothing is left behind."""

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from helixflow.pool.manifest import StoredModel
from tests.harness.node import Node, command_of

MODELS = ("first", "second")
SETTINGS = """
[[models]]
name = "{name}"
[[models.deployments]]
engine = "llama_cpp"
source = "{source}"
context = 1024
parallel = 2
load = "first_use"
prompt_cache_mib = 128
"""
# One takes about 330 MB.
LIMIT_BYTES = 600_000_000


@pytest.fixture(scope="module")
def turns(pytestconfig: pytest.Config) -> int:
    return 20 if pytestconfig.getoption("--long") else 4


async def test_models_take_turns(
    start_node: Callable[..., Node], chat_model: StoredModel, tmp_path: Path, turns: int
) -> None:
    config = tmp_path / "models.toml"
    config.write_text("".join(SETTINGS.format(name=name, source=chat_model.source) for name in MODELS))
    node = start_node(
        HELIXFLOW_CONFIG=str(config),
        HELIXFLOW_POOL__MEMORY_BYTES=str(LIMIT_BYTES),
        HELIXFLOW_POOL__MIN_RESIDENCE_S="0",
    )
    sizes: list[int] = []
    for turn in range(turns):
        for name in MODELS:
            answer = await node.chat(f"Say {turn}.", model=name)
            assert answer.status == 200, answer.body
        sizes.append(size_of_pool(node))
    print("MB after each turn:", [size // 1_000_000 for size in sizes])
    # The second of the last two, or the first: what leaks is in both.
    assert min(sizes[-2:]) <= sizes[min(1, len(sizes) - 2)] * 1.05
    assert len(node.records("deployment.evicted")) == 2 * turns - 1
    assert not node.records("replica.down")
    assert not node.records("deployment.failed")


def size_of_pool(node: Node) -> int:
    """Resident bytes of launcher and control process, which the pool is part of."""
    control = next(process for process in node.tree() if "helixflow.launch.control" in command_of(process))
    return int(psutil.Process(node.process.pid).memory_info().rss + control.memory_info().rss)
