"""Calls that are made until they succeed: nothing that was admitted is given up because a service is down."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import structlog

from helixflow.core.errors import HelixError
from helixflow.process.backoff import Backoff

MAX_PAUSE_S: Final = 1.0
# What asking again does not mend. Everything else may pass: a database that is away, a certificate that is renewed.
_REFUSALS: Final = frozenset({"INVALID_ARGUMENT", "NOT_FOUND", "ABORTED", "FAILED_PRECONDITION"})

Answer = TypeVar("Answer")

log = structlog.get_logger("helixflow.shipper")


class Delivery:
    """Insists on calls to one service, `name` in logs. `failing_code` is that of the outage that lasts, if one does."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.failing_code = ""

    async def insist(self, call: Callable[[], Awaitable[Answer]]) -> Answer:
        """The answer, however long that takes; an outage is logged once. Raises `HelixError` when it is refused."""
        backoff = Backoff(initial_s=0.05, maximum_s=MAX_PAUSE_S)
        while True:
            try:
                answer = await call()
            except HelixError as exc:
                if exc.traits.grpc in _REFUSALS:
                    raise
                if not self.failing_code:
                    log.warning("service.lost", service_name=self._name, code=exc.code, reason=exc.message)
                self.failing_code = exc.code
            else:
                if self.failing_code:
                    log.info("service.restored", service_name=self._name)
                    self.failing_code = ""
                return answer
            await asyncio.sleep(backoff.next_delay_s(0))
