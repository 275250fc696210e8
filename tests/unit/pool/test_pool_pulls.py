"""Pulls that several wait for."""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from helixflow.core.errors import ExitCode, UserError
from helixflow.pool.catalogue import ModelSpec
from helixflow.pool.manifest import StoredModel
from helixflow.pool.progress import PullProgress, Report
from helixflow.pool.pulls import Pulls

SPEC = ModelSpec("m", "file:/m.gguf", "chat")
MODEL = StoredModel("m", "file:/m.gguf", "a" * 64, Path("/m.gguf"), 1, "", 4096, "chat", None, 0.0)


class Store:
    """A pull that goes on when the test lets it."""

    def __init__(self) -> None:
        self.calls = 0
        self.go = threading.Event()
        self.ended = threading.Event()
        self.error: Exception | None = None

    def pull(self, _spec: ModelSpec, report: Report) -> StoredModel:
        self.calls += 1
        try:
            while not self.go.wait(0.005):
                report(PullProgress("downloading", 1, 2))
        finally:
            self.ended.set()
        if self.error is not None:
            raise self.error
        return MODEL


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
async def pulls(store: Store) -> AsyncIterator[Pulls]:
    pulls = Pulls(store.pull)
    async with asyncio.timeout(60):
        yield pulls
    store.go.set()
    pulls.close()


def start(pulls: Pulls) -> "tuple[asyncio.Task[StoredModel], asyncio.Event]":
    """A pull, and what is set once it has heard of progress."""
    heard = asyncio.Event()
    return asyncio.create_task(pulls.pull(SPEC, lambda _progress: heard.set())), heard


async def test_one_works_and_all_hear_of_it(pulls: Pulls, store: Store) -> None:
    tasks = [start(pulls) for _ in range(3)]
    for _, heard in tasks:
        await heard.wait()
    store.go.set()
    assert await asyncio.gather(*(task for task, _ in tasks)) == [MODEL] * 3
    assert store.calls == 1
    assert await start(pulls)[0] == MODEL
    assert store.calls == 2, "the store knows what is there already"


async def test_it_goes_on_for_those_who_stay_and_ends_with_the_last(pulls: Pulls, store: Store) -> None:
    (first, _), (second, heard) = start(pulls), start(pulls)
    await heard.wait()
    first.cancel()
    await asyncio.wait([first])
    assert not store.ended.is_set()
    second.cancel()
    await asyncio.wait([second])
    assert await asyncio.to_thread(store.ended.wait, 5)
    again, heard = start(pulls)
    await heard.wait()
    store.go.set()
    assert await again == MODEL


async def test_a_failure_is_everybodys(pulls: Pulls, store: Store) -> None:
    store.error = UserError("no network", ExitCode.UNAVAILABLE)
    tasks = [start(pulls) for _ in range(2)]
    store.go.set()
    for task, _ in tasks:
        with pytest.raises(UserError, match="no network"):
            await task
