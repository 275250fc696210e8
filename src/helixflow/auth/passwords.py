"""Hashes of passwords: argon2id, a few at a time, so that sign-ins take little from everything else."""

import asyncio
import base64
import os
import secrets
import sys
import threading
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from argon2 import PasswordHasher, Type
from argon2.exceptions import InvalidHashError, VerificationError

from helixflow.auth.password_rules import PasswordRules
from helixflow.core.clock import Clock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.process.cores import usable_cores

MAX_PASSWORD_BYTES: Final = 1024
# OWASP's least for argon2id: 25 ms of CPU on a 2020s core (argon2-cffi's own default takes 196 ms).
_MEMORY_KIB: Final = 19 * 1024
_PASSES: Final = 2
_LANES: Final = 1
_SALT_BYTES: Final = 16
_HASH_BYTES: Final = 32
# Passwords that may wait, and how long the last of them would: who comes later is sent away at once.
_MAX_WAITING: Final = 128
_MAX_WAIT_S: Final = 3.0
_FIRST_ESTIMATE_S: Final = 0.03
# Below everything that answers requests.
_NICENESS: Final = 10
_T = TypeVar("_T")


class Passwords:
    """Hashes and verifies in threads of lower priority, at most one for two cores. `close` it.

    Passwords are compared after NFKC (NIST SP 800-63B, 3.1.1.2), so that the same characters typed on another system
    are the same password.
    """

    def __init__(self, rules: PasswordRules, clock: Clock, *, workers: int | None = None) -> None:
        self._rules = rules
        self._clock = clock
        self._workers = workers or max(1, usable_cores() // 2)
        self._threads = ThreadPoolExecutor(self._workers, "passwords", initializer=_lower_priority)
        self._hasher = PasswordHasher(_PASSES, _MEMORY_KIB, _LANES, _HASH_BYTES, _SALT_BYTES, type=Type.ID)
        self._nobodys = _hash_of_nothing()
        self._pending = 0
        self._estimate_s = _FIRST_ESTIMATE_S

    async def hash_new(self, password: str, *, email: str, name: str, param: str = "password") -> str:
        """The hash to store of a password that somebody chose.

        Raises `HelixError` UNPROCESSABLE (`param`) for one that breaks a rule, TOO_MANY_ATTEMPTS when too many wait.
        """
        check_length(password, param)

        def work() -> str:
            normal = _normalise(password)
            self._rules.check(normal, email=email, name=name, param=param)
            return self._hasher.hash(normal)

        return await self._in_thread(work)

    async def rehash(self, password: str) -> str:
        """The hash of a password that was accepted before, whatever the rules are now. Raises TOO_MANY_ATTEMPTS."""
        return await self._in_thread(lambda: self._hasher.hash(_normalise(password)))

    async def verify(self, password: str, stored: str | None, param: str = "password") -> bool:
        """Whether `password` is the one with that hash. None, for want of an account or of a password, is false after
        the same work. Raises `HelixError`: UNPROCESSABLE (`param`) for one that is too long, TOO_MANY_ATTEMPTS when too
        many wait.
        """
        check_length(password, param)

        def work() -> bool:
            try:
                return self._hasher.verify(stored or self._nobodys, _normalise(password)) and stored is not None
            except (VerificationError, InvalidHashError):
                return False

        return await self._in_thread(work)

    def is_outdated(self, stored: str) -> bool:
        """Whether the hash was made with other parameters than today's."""
        return self._hasher.check_needs_rehash(stored)

    def close(self) -> None:
        """Ends the threads; what waits is cancelled. Idempotent."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        wait_s = self._pending / self._workers * self._estimate_s
        if self._pending >= _MAX_WAITING or wait_s > _MAX_WAIT_S:
            raise HelixError(
                ErrorKind.TOO_MANY_ATTEMPTS,
                "Too many sign-ins at the moment. Try again.",
                retry_after_s=max(1.0, wait_s),
            )

        def timed() -> tuple[_T, float]:
            started = self._clock.monotonic()
            return work(), self._clock.monotonic() - started

        self._pending += 1
        try:
            answer, took_s = await asyncio.get_running_loop().run_in_executor(self._threads, timed)
        finally:
            self._pending -= 1
        self._estimate_s += (took_s - self._estimate_s) / 8
        return answer


def check_length(password: str, param: str = "password") -> None:
    """Raises `HelixError` UNPROCESSABLE for a password that is too long to be looked at."""
    if len(password.encode()) > MAX_PASSWORD_BYTES:
        message = f"A password has at most {MAX_PASSWORD_BYTES} bytes."
        raise HelixError(ErrorKind.UNPROCESSABLE, message, param=param)


def _normalise(password: str) -> str:
    return unicodedata.normalize("NFKC", password)


def _hash_of_nothing() -> str:
    """A hash that no password has, as far as anybody can know, and that takes as long as any to verify."""
    salt, tag = (
        base64.b64encode(secrets.token_bytes(size)).decode().rstrip("=") for size in (_SALT_BYTES, _HASH_BYTES)
    )
    return f"$argon2id$v=19$m={_MEMORY_KIB},t={_PASSES},p={_LANES}${salt}${tag}"


def _lower_priority() -> None:
    if sys.platform == "linux":
        # There, unlike elsewhere, a thread has a niceness of its own.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
