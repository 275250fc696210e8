"""One `helixflow serve` in its default configuration for all tests of this folder."""

from collections.abc import Iterator

import pytest

from helixflow.pool.manifest import StoredModel
from tests.harness.node import Node, run_node


@pytest.fixture(scope="package")
def node(
    chat_model: StoredModel, embedding_model: StoredModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Node]:
    with run_node(tmp_path_factory.mktemp("serve") / "data", chat_model, embedding_model) as running:
        yield running
