"""Turns at trying passwords: of one address a few at a time, and none that could exceed the limit of failures."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from helixflow.auth.dispatch import Invocation
from helixflow.auth.lockout import Attempt, Lockout
from helixflow.core.errors import ErrorKind, HelixError

# So that one address is no burden for the others.
AT_ONCE: Final = 4
_MAX_WAITING: Final = 64
_PATIENCE_S: Final = 5.0
# Attempts in another process end unheard.
_POLL_S: Final = 0.05


@dataclass(slots=True)
class _Gate:
    places: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))
    users: int = 0


class Attempts:
    """Whoever finds as many attempts under way as may be waits for their end: correct passwords do not lock each other
    out, and wrong ones become failures, which lock out those who wait.
    """

    def __init__(self, lockout: Lockout) -> None:
        self._lockout = lockout
        self._gates: dict[bytes, _Gate] = {}

    @asynccontextmanager
    async def turn(self, invocation: Invocation, email: str) -> AsyncIterator[Attempt]:
        """An attempt on `email` that is reserved: within the block try it, and `release` or `fail` it.

        Raises `HelixError` TOO_MANY_ATTEMPTS while locked out, and when it is not its turn within 5 s. While locked out
        nothing is written.
        """
        attempt = self._lockout.attempt(email, invocation.caller.source.address)
        deadline = asyncio.get_running_loop().time() + _PATIENCE_S
        async with self._place(attempt.address or attempt.email, deadline):
            while not await self._reserve(invocation, attempt):
                if asyncio.get_running_loop().time() >= deadline:
                    raise _busy()
                await asyncio.sleep(_POLL_S)
            yield attempt

    async def _reserve(self, invocation: Invocation, attempt: Attempt) -> bool:
        if not await self._lockout.admits(invocation.lookups, attempt, invocation.now):
            return False
        async with invocation.writing() as unit:
            return await self._lockout.reserve(unit, attempt)

    @asynccontextmanager
    async def _place(self, key: bytes, deadline: float) -> AsyncIterator[None]:
        """One of the places of an address, or of an e-mail when nobody knows the address."""
        gate = self._gates.setdefault(key, _Gate())
        if gate.users >= AT_ONCE + _MAX_WAITING:
            raise _busy()
        gate.users += 1
        try:
            try:
                async with asyncio.timeout_at(deadline):
                    await gate.places.acquire()
            except TimeoutError as exc:
                raise _busy() from exc
            try:
                yield
            finally:
                gate.places.release()
        finally:
            gate.users -= 1
            if not gate.users:
                del self._gates[key]


def _busy() -> HelixError:
    return HelixError(ErrorKind.TOO_MANY_ATTEMPTS, "Too many sign-ins at the moment. Try again.", retry_after_s=1)
