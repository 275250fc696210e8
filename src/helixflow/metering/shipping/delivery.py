"""Calls that are made until they succeed: nothing that was admitted is given up because a service is down."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import structlog

from helixflow.core.errors import HelixError
from helixflow.process.backoff import Backoff

MAX_PAUSE_S: Final = 1.0
START_GRACE_S: Final = 10.0
# What asking again does not mend. Everything else may pass: a database that is away, a certificate that is renewed.
_REFUSALS: Final = frozenset({"INVALID_ARGUMENT", "NOT_FOUND", "ABORTED", "FAILED_PRECONDITION"})

Answer = TypeVar("Answer")

log = structlog.get_logger("helixflow.shipper")


class Delivery:
    """Insists on calls to one service, `name` in logs. `failing_code` is that of the outage that lasts, if one does."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._answers = 0
        self._failing_since: float | None = None
        self._is_told = False
        self.failing_code = ""

    async def insist(self, call: Callable[[], Awaitable[Answer]]) -> Answer:
        """The answer, however long that takes; an outage is logged once. Raises `HelixError` when it is refused."""
        backoff = Backoff(initial_s=0.05, maximum_s=MAX_PAUSE_S)
        while True:
            answers = self._answers
            try:
                answer = await call()
            except HelixError as exc:
                if exc.traits.grpc in _REFUSALS:
                    raise
                # Another call may have been answered since this one began.
                if answers == self._answers:
                    self._note_failure(exc)
            else:
                self._note_answer()
                return answer
            await asyncio.sleep(backoff.next_delay_s(0))

    def _note_failure(self, error: HelixError) -> None:
        now = asyncio.get_running_loop().time()
        if self._failing_since is None:
            self._failing_since = now
        self.failing_code = error.code
        # At the start the services come up in any order.
        is_due = self._answers > 0 or now - self._failing_since >= START_GRACE_S
        if is_due and not self._is_told:
            self._is_told = True
            log.warning("service.lost", service_name=self._name, code=error.code, reason=error.message)

    def _note_answer(self) -> None:
        self._answers += 1
        if self._is_told:
            log.info("service.restored", service_name=self._name)
        self._failing_since, self._is_told, self.failing_code = None, False, ""
