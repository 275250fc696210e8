"""Two nodes on one PostgreSQL, as a fleet begins: what is done on one holds on the other."""

import asyncio
import contextlib
import json
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helixflow.core.errors import ExitCode
from helixflow.core.keys import generate_key
from tests.harness.node import READY_S, Node
from tests.harness.postgres import PostgresServer
from tests.harness.visitor import PASSWORD, Visitor, until_refused, visit

# No engine starts, nothing is fetched: these nodes are about identity.
CONFIG = """
[[models]]
name = "idle"
[[models.deployments]]
engine = "openai"
base_url = "http://127.0.0.1:9/v1"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the nodes find what they share: the password, and the master key."""
    folder = tmp_path_factory.mktemp("fleet")
    (folder / "h.toml").write_text(CONFIG)
    key = folder / "fleet.key"
    key.touch(mode=0o600)
    key.write_text(secrets.token_hex(32))
    return folder


@pytest.fixture(scope="module")
def database_url(postgres_server: PostgresServer) -> Iterator[str]:
    with postgres_server.database() as url:
        yield url


@pytest.fixture(scope="module")
def settings_of(postgres_server: PostgresServer, folder: Path, database_url: str) -> Callable[..., dict[str, str]]:
    """The environment of a node on the database."""

    def make(**more: str) -> dict[str, str]:
        database = postgres_server.settings(database_url, folder)
        return {
            "HELIXFLOW_CONFIG": str(folder / "h.toml"),
            "HELIXFLOW_DATABASE__URL": database.url,
            "HELIXFLOW_DATABASE__PASSWORD_FILE": str(database.password_file),
            "HELIXFLOW_AUTH__MASTER_KEY_FILE": str(folder / "fleet.key"),
            **more,
        }

    return make


@pytest.fixture(scope="module")
def nodes(folder: Path, settings_of: Callable[..., dict[str, str]]) -> Iterator[tuple[Node, Node]]:
    """Both started at once, on an empty database."""
    shared = {"HELIXFLOW_BOOTSTRAP_API_KEY": generate_key()}
    with contextlib.ExitStack() as stack:
        pair = [Node(folder / name, **settings_of(**shared)) for name in ("a", "b")]
        for node in pair:
            stack.callback(node.close)
            node.key = shared["HELIXFLOW_BOOTSTRAP_API_KEY"]
        first, second = (node.wait_ready() for node in pair)
        yield first, second


@contextlib.asynccontextmanager
async def visit_both(nodes: tuple[Node, Node]) -> "contextlib.AsyncExitStack[tuple[Visitor, Visitor]]":  # type: ignore[misc]
    async with visit(nodes[0]) as a, visit(nodes[1]) as b:
        yield a, b
