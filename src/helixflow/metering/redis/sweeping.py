"""Deletes what epochs have left in Redis that are over. A server that was emptied has nothing; one that started again
with its data has."""

from typing import Final

from helixflow.metering.redis.connection import RedisConnection
from helixflow.metering.redis.keys import GARBAGE

_KEYS_A_STEP: Final = b"500"
_BEGINNING: Final = b"0"


class Sweeper:
    """Goes through all keys in small steps. Several gateways may do it at once: deleting twice is deleting."""

    def __init__(self) -> None:
        self._may_have_some = False
        self._epochs: list[bytes] = []
        self._cursor = _BEGINNING

    def begin(self) -> None:
        """There may be something to do."""
        self._may_have_some = True

    async def step(self, connection: RedisConnection) -> None:
        if self._may_have_some and not self._epochs:
            reply = await connection.command(b"SMEMBERS", GARBAGE.encode())
            self._epochs = [epoch for epoch in reply if isinstance(epoch, bytes)] if isinstance(reply, list) else []
            self._may_have_some = False
            self._cursor = _BEGINNING
        if not self._epochs:
            return
        epoch = self._epochs[0]
        pattern = b"hf:%b:*" % epoch
        reply = await connection.command(b"SCAN", self._cursor, b"MATCH", pattern, b"COUNT", _KEYS_A_STEP)
        match reply:
            case [bytes() as cursor, [*keys]]:
                if keys:
                    await connection.command(b"UNLINK", *(key for key in keys if isinstance(key, bytes)))
                self._cursor = cursor
                if cursor == _BEGINNING:
                    await connection.command(b"SREM", GARBAGE.encode(), epoch)
                    del self._epochs[0]
            case _:
                self._epochs.clear()
