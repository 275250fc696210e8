"""What becomes in Redis of the holds of a gateway that has ended; asked for by the shipper that closes its journal."""

import asyncio
from collections.abc import Sequence
from typing import Final

import msgspec

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.admission import Settlement
from helixflow.metering.redis.connection import Answer, Lost, RedisConnection
from helixflow.metering.redis.fallback import LEASE_HOLD
from helixflow.metering.redis.keys import EPOCH, journal_key
from helixflow.metering.redis.link import RedisLink, RedisUnavailable
from helixflow.metering.redis.resp import Reply, encode_arguments
from helixflow.settings.tree import RedisSettings

# A script holds the server up for as long as it runs.
_A_TIME: Final = 500
_NO_LEASE: Final = -1

_ENCODE: Final = msgspec.msgpack.Encoder().encode


class RedisJournalCloser:
    """Implements `metering.shipping.closing.JournalCloser`. Connects for each journal: that is seldom.

    In an epoch that the gateway has never joined there is nothing to do: it began after the gateway's end, or waits for
    the ledger to have the journal closed, and then has all of it in the ledger's sums.
    """

    def __init__(self, settings: RedisSettings) -> None:
        self._link = RedisLink(settings, "helixflow-shipper")

    async def close(self, journal_id: str, settlements: Sequence[Settlement]) -> None:
        await self._run(journal_id, settlements, lost=False)

    async def close_lost(self, journal_id: str) -> None:
        await self._run(journal_id, (), lost=True)

    async def _run(self, journal_id: str, settlements: Sequence[Settlement], *, lost: bool) -> None:
        try:
            connection, run_id = await self._link.connect(_ignore, _ignore_loss)
        except RedisUnavailable as exc:
            raise _unavailable(str(exc)) from exc
        try:
            known = await _answer(connection.command(b"HMGET", EPOCH.encode(), b"id", b"run"))
            match known:
                case [bytes() as epoch, bytes() as run] if run == run_id.encode():
                    await self._close(connection, epoch.decode(), journal_id, settlements, lost=lost)
                case _:
                    # No gateway goes on with what is there; the next one to come begins an epoch.
                    return
        finally:
            connection.close()

    async def _close(
        self, connection: RedisConnection, epoch: str, journal_id: str, settlements: Sequence[Settlement], *, lost: bool
    ) -> None:
        journal = journal_key(epoch, journal_id).encode()
        scripts = self._link.scripts
        # Nearly all are known there or were settled long ago; those granted without Redis decide about the lease, which
        # must happen in one with its end.
        leased = [settlement for settlement in settlements if _generation(settlement) != _NO_LEASE]
        others = [_words(settlement) for settlement in settlements if _generation(settlement) == _NO_LEASE]
        for start in range(0, len(others), _A_TIME):
            tail = encode_arguments(b"1", journal, journal_id.encode(), _ENCODE(others[start : start + _A_TIME]))
            await _answer(connection.evaluate(scripts.settle, tail))
        ended = [(*_words(settlement), _generation(settlement)) for settlement in leased]
        tail = encode_arguments(b"1", journal, journal_id.encode(), b"1" if lost else b"0", _ENCODE(ended))
        await _answer(connection.evaluate(scripts.close, tail))


def _words(settlement: Settlement) -> tuple[str, int, int, int]:
    return settlement.call_id, settlement.tokens, settlement.cost, settlement.position


def _generation(settlement: Settlement) -> int:
    return next((amount for name, amount in settlement.holds if name == LEASE_HOLD), _NO_LEASE)


async def _answer(answer: Answer) -> Reply:
    reply = await answer
    if type(reply) is Lost:
        raise _unavailable(reply.reason)
    return reply


def _unavailable(reason: str) -> HelixError:
    error = HelixError(ErrorKind.UNAVAILABLE, "The server that counts limits and budgets does not answer. Try again.")
    error.__cause__ = RedisUnavailable(reason)
    return error


def _ignore(_answer: "asyncio.Future[Reply]", _reply: Reply) -> None:
    """Nobody gives up here."""


def _ignore_loss(_reason: str) -> None:
    """Whoever waits is told."""
