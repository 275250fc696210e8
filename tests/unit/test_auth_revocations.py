import asyncio

import pytest

from helixflow.auth.keys import Revocation
from helixflow.auth.revocations import RevocationFeed
from helixflow.core.errors import ErrorKind, HelixError


async def test_a_watcher_gets_the_revision_first_and_then_each_revocation_in_order() -> None:
    feed = RevocationFeed(3)
    watch = feed.watch()
    assert await anext(watch) == Revocation(3, b"")
    feed.publish(Revocation(4, b"x"))
    feed.publish(Revocation(5, b"y"))
    assert [await anext(watch), await anext(watch)] == [Revocation(4, b"x"), Revocation(5, b"y")]
    await watch.aclose()
    assert feed.watchers == 0


async def test_a_slow_watcher_is_cut_off_and_the_others_are_not() -> None:
    feed = RevocationFeed(0, queue_length=2)
    slow, quick = feed.watch(), feed.watch()
    await anext(slow)
    await anext(quick)
    for number in (1, 2, 3):
        feed.publish(Revocation(number, b""))
        assert (await anext(quick)).revision == number
    assert feed.watchers == 1
    assert [(await anext(slow)).revision, (await anext(slow)).revision] == [1, 2]
    with pytest.raises(HelixError) as caught:
        await anext(slow)
    assert caught.value.kind is ErrorKind.OVERLOADED
    await quick.aclose()


async def test_closing_ends_waiting_watchers_and_refuses_new_ones() -> None:
    feed = RevocationFeed(0)
    watch = feed.watch()
    await anext(watch)
    waiting = asyncio.create_task(anext(watch))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    feed.close()
    feed.close()
    for attempt in (waiting, anext(feed.watch())):
        with pytest.raises(HelixError) as caught:
            await attempt
        assert caught.value.kind is ErrorKind.SHUTTING_DOWN
