"""A node in front of a mock provider, and what its ledger holds."""

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.processes import serving
from helixflow.storage.sqlite import FILE_NAME
from tests.harness.node import Node, run_node

MODEL = "mock"
PACED_MODEL = "mock-paced"
# Of a paced stream.
EVENTS_A_SECOND = 50


@contextlib.contextmanager
def run_mock_node(folder: Path, **settings: str) -> Iterator[Node]:
    """A node whose models are those of benchmarks/mock_upstream.py; `settings` are environment variables."""
    with serving("benchmarks.mock_upstream") as (_, port):
        config = folder / "mock.toml"
        config.write_text(
            "".join(
                f'[[models]]\nname = "{name}"\n[[models.deployments]]\nengine = "openai"\n'
                f'base_url = "http://127.0.0.1:{port}/v1"\ncontext = 100000\n'
                for name in (MODEL, PACED_MODEL)
            )
        )
        with run_node(folder / "data", HELIXFLOW_CONFIG=str(config), **settings) as node:
            yield node


def chat_body(model: str = MODEL, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "Say something."}], **fields}


class SqliteLedger:
    """The ledger of a node on SQLite, read beside it."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / FILE_NAME

    def rows(self, table: str = "requests") -> list[dict[str, Any]]:
        """All rows; `requests` in the order of admission."""
        with contextlib.closing(sqlite3.connect(f"file:{self._path}?mode=ro", uri=True, timeout=60)) as connection:
            connection.row_factory = sqlite3.Row
            order = " ORDER BY call_id" if table == "requests" else ""
            return [dict(row) for row in connection.execute(f"SELECT * FROM {table}{order}")]

    def count(self) -> int:
        with contextlib.closing(sqlite3.connect(f"file:{self._path}?mode=ro", uri=True, timeout=60)) as connection:
            (count,) = connection.execute("SELECT count(*) FROM requests").fetchone()
            return int(count)

    def open_journals(self) -> list[str]:
        return [row["id"] for row in self.rows("journals") if row["closed_at"] is None]


def content_events(body: bytes) -> int:
    """How many pieces of content a (perhaps broken) stream has brought."""
    found = 0
    for line in body.split(b"\n"):
        if line.startswith(b"data: {") and line.endswith(b"}"):
            choices = json.loads(line.removeprefix(b"data: ")).get("choices")
            found += bool(choices and choices[0]["delta"].get("content"))
    return found
