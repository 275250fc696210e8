"""What becomes in Redis of the holds of a gateway that has ended; asked for by the shipper that closes its journal."""

import asyncio
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final

import msgspec
import structlog

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.admission import Settlement
from helixflow.metering.redis.connection import Answer, Lost, RedisConnection
from helixflow.metering.redis.fallback import LEASE_HOLD
from helixflow.metering.redis.keys import EPOCH, budget_place, epoch_key, journal_key
from helixflow.metering.redis.link import RedisLink, RedisUnavailable
from helixflow.metering.redis.plan import Reservation
from helixflow.metering.redis.resp import Reply, encode_arguments
from helixflow.metering.redis.scripts import Script
from helixflow.metering.shipping.closing import LostCall
from helixflow.settings.tree import RedisSettings

# A script holds the server up for as long as it runs.
_A_TIME: Final = 500
_NO_LEASE: Final = -1
# What the hold of a budget begins with, see `metering.admission`.
_BUDGET_HOLD: Final = "b:"
_MONEY: Final = 1
_CALL_ID: Final = re.compile(rb"[0-9a-f]{32}")

_ENCODE: Final = msgspec.msgpack.Encoder().encode
_RESERVATION: Final = msgspec.msgpack.Decoder(Reservation)

log = structlog.get_logger("helixflow.shipper")


class RedisJournalCloser:
    """Implements `metering.shipping.closing.JournalCloser`. Connects for each question: they are seldom.

    In an epoch that the gateway has never joined there is nothing to do: it began after the gateway's end, or waits for
    the ledger to have the journal closed, and then has all of it in the ledger's sums.
    """

    def __init__(self, settings: RedisSettings) -> None:
        self._link = RedisLink(settings, "helixflow-shipper")

    async def settle(self, journal_id: str, settlements: Sequence[Settlement]) -> list[Settlement]:
        """Keeps back those that were granted without Redis: they decide about the leases, in one with their end."""
        leased = [settlement for settlement in settlements if _generation(settlement) != _NO_LEASE]
        others = [_words(settlement) for settlement in settlements if _generation(settlement) == _NO_LEASE]
        async with self._journal(journal_id) as journal:
            if journal is not None:
                for start in range(0, len(others), _A_TIME):
                    await journal.run(self._link.scripts.settle, _ENCODE(others[start : start + _A_TIME]))
        return leased

    async def close(self, journal_id: str, settlements: Sequence[Settlement]) -> None:
        async with self._journal(journal_id) as journal:
            if journal is not None:
                ended = [journal.leased_words(settlement) for settlement in settlements]
                await journal.run(self._link.scripts.close, b"0", _ENCODE(ended))

    async def list_lost(self, journal_id: str) -> list[LostCall]:
        async with self._journal(journal_id) as journal:
            if journal is None:
                return []
            match await _answer(journal.connection.command(b"HGETALL", journal.key)):
                case dict() as fields:
                    return _read_calls(journal_id, fields)
                case _:
                    return []

    async def close_lost(self, journal_id: str) -> None:
        async with self._journal(journal_id) as journal:
            if journal is not None:
                await journal.run(self._link.scripts.close, b"1", _ENCODE(()))

    @asynccontextmanager
    async def _journal(self, journal_id: str) -> AsyncIterator["_Journal | None"]:
        """None: no gateway goes on with what is there, the next one to come begins an epoch."""
        try:
            connection, run_id = await self._link.connect(_ignore, _ignore_loss)
        except RedisUnavailable as exc:
            raise _unavailable(str(exc)) from exc
        try:
            match await _answer(connection.command(b"HMGET", EPOCH.encode(), b"id", b"run")):
                case [bytes() as epoch, bytes() as run] if run == run_id.encode():
                    yield _Journal(connection, epoch.decode(), journal_id)
                case _:
                    yield None
        finally:
            connection.close()


class _Journal:
    """What Redis has of one journal, in the epoch that lasts."""

    def __init__(self, connection: RedisConnection, epoch: str, journal_id: str) -> None:
        self.connection = connection
        self.key = journal_key(epoch, journal_id).encode()
        self._epoch = epoch
        self._journal_id = journal_id.encode()

    async def run(self, script: Script, *arguments: bytes) -> None:
        tail = encode_arguments(b"1", self.key, self._journal_id, *arguments)
        await _answer(self.connection.evaluate(script, tail))

    def leased_words(self, settlement: Settlement) -> tuple[object, ...]:
        keys = [
            epoch_key(self._epoch, budget_place(settlement.organisation_id, name))
            for name, _ in settlement.holds
            if name.startswith(_BUDGET_HOLD)
        ]
        return (*_words(settlement), _generation(settlement), keys)


def _read_calls(journal_id: str, fields: Mapping[Reply, Reply]) -> list[LostCall]:
    calls: list[LostCall] = []
    for name, value in fields.items():
        if not isinstance(name, bytes) or not isinstance(value, bytes) or not _CALL_ID.fullmatch(name):
            continue
        try:
            _, _, budgets, _, (organisation_id, project_id, key_id, admitted_at_ms) = _RESERVATION.decode(value)
        except msgspec.DecodeError:
            log.error("reservation.unreadable", journal=journal_id, call=name.decode())
            continue
        cost = max((amount for _, amount, _, unit, _ in budgets if unit == _MONEY), default=0)
        calls.append(LostCall(name.decode(), organisation_id, project_id, key_id, admitted_at_ms, cost))
    return sorted(calls, key=lambda call: call.call_id)


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
