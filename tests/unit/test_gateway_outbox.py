"""Responses that leave together: what waits, what does not, and in which order."""

import asyncio
from typing import cast

from helixflow.gateway.outbox import MANY, Outbox


class Transport:
    """Keeps what is written, in a list that several may share."""

    def __init__(self, written: list[bytes]) -> None:
        self._written = written

    def write(self, data: bytes) -> None:
        self._written.append(data)


def transport(written: list[bytes]) -> asyncio.Transport:
    return cast(asyncio.Transport, Transport(written))


async def test_a_lone_response_leaves_at_once() -> None:
    written: list[bytes] = []
    Outbox(lambda: MANY).write(transport(written), b"one")
    assert written == [b"one"]


async def test_many_responses_leave_in_order_with_the_next_turn_of_the_loop() -> None:
    written: list[bytes] = []
    outbox = Outbox(lambda: MANY + 1)
    for response in (b"one", b"two", b"three"):
        outbox.write(transport(written), response)
    assert written == []
    await asyncio.sleep(0)
    assert written == [b"one", b"two", b"three"]
    outbox.write(transport(written), b"four")
    await asyncio.sleep(0)
    assert written[3:] == [b"four"]


async def test_who_must_write_now_flushes_first() -> None:
    written: list[bytes] = []
    outbox = Outbox(lambda: MANY + 1)
    outbox.write(transport(written), b"one")
    outbox.flush()
    assert written == [b"one"]
    await asyncio.sleep(0)
    assert written == [b"one"]
