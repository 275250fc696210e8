"""Nodes to be hurt."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from helixflow.pool.manifest import StoredModel
from tests.harness.node import Node, run_node


@pytest.fixture(scope="session")
def rounds(pytestconfig: pytest.Config) -> int:
    """How often something is killed."""
    return 1000 if pytestconfig.getoption("--long") else 20


@pytest.fixture(scope="session")
def outage_s(pytestconfig: pytest.Config) -> float:
    """How long something is away, seconds."""
    return 120.0 if pytestconfig.getoption("--long") else 5.0


@pytest.fixture(scope="module")
def node(chat_model: StoredModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """One that survives what is done to it."""
    with run_node(tmp_path_factory.mktemp("chaos") / "data", chat_model) as running:
        yield running


@pytest.fixture
def start_node(chat_model: StoredModel, tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """Starts one that will not; `settings` are environment variables."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(run_node(tmp_path / "data", chat_model, **settings))
