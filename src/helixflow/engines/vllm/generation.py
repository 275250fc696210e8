"""One streamed generation on one replica of vLLM, and what its refusals mean."""

import time
from typing import Final

import msgspec

from helixflow.core.call import Call
from helixflow.core.capacity import Lease, Replica
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.provider_errors import event_refusal, read_error, refusal
from helixflow.engines.addressing import origin_of
from helixflow.engines.provider import settle
from helixflow.engines.replica_faults import is_replica_fault
from helixflow.engines.vllm.token_ids import TokenEvents
from helixflow.transport.client import HttpClient, HttpResponse, Timeouts, build_head
from helixflow.transport.sse import data_of

BROKEN_OFF: Final = "The model's engine stopped in the middle of the answer."
_TIMEOUTS: Final = Timeouts(connect_s=2, first_byte_s=600, idle_s=600)
_MAX_ERROR_BYTES: Final = 64 * 1024
# How vLLM names its limit where the prompt alone would fit.
_LIMIT_MARK: Final = "max_model_len"


class Generation:
    """A running generation; `close` ends it and gives the slot back. `events` knows its tokens, `broken_off` is set
    once its replica is lost in the middle of it.
    """

    def __init__(self, response: HttpResponse, lease: Lease, call: Call) -> None:
        self._response = response
        self._lease = lease
        self._usage = call.progress.usage
        self._charged_prompt = False
        self._charged = 0
        self.events = TokenEvents()
        self.broken_off = False

    @property
    def replica_id(self) -> str:
        return self._lease.replica.replica_id

    @property
    def context(self) -> int:
        """The most tokens of prompt and answer."""
        return self._lease.replica.context

    async def read(self) -> bytes:
        """The next events as they came, without token ids; `b""` after the last one.

        Raises `HelixError`: UPSTREAM_UNAVAILABLE when the replica is lost, and what an error event means.
        """
        while not self.events.done:
            out = self.events.feed(await self._receive())
            self._charge()
            if out:
                return b"".join(out)
        return b""

    async def finish(self) -> None:
        """Everything was read: the connection is kept if it is in order."""
        await settle(self._response)
        self._lease.release()

    def close(self) -> None:
        """Idempotent."""
        self._response.close()
        self._lease.release()

    def _charge(self) -> None:
        """What was read and made since the last time; the slot is free once all of it was."""
        events = self.events
        if not self._charged_prompt and (prompt := events.prompt_tokens):
            self._charged_prompt = True
            self._lease.charge(prompt)
            # A client that leaves now leaves this to be paid.
            self._usage.prompt_tokens = self._usage.prompt_tokens or prompt
        if events.made > self._charged:
            self._lease.charge(events.made - self._charged)
            self._charged = events.made
        if events.done:
            self._lease.release()

    async def _receive(self) -> bytes:
        if self.events.failure:
            raise self._failed()
        try:
            data = await self._response.read()
        except HelixError as exc:
            if exc.kind is ErrorKind.DEADLINE:
                raise
            raise self._lost() from exc
        if not data:
            raise self._lost()
        return data

    def _failed(self) -> HelixError:
        """vLLM tells of the end of its core in an event."""
        error = event_refusal(read_error(data_of(self.events.failure) or b""))
        return self._lost() if is_replica_fault(error) else error

    def _lost(self) -> HelixError:
        self._lease.release(failed=True)
        self.broken_off = True
        return HelixError(ErrorKind.UPSTREAM_UNAVAILABLE, BROKEN_OFF)


async def post(client: HttpClient, replica: Replica, path: str, body: bytes, call: Call) -> HttpResponse:
    """An answer with status 200. Close it. Raises `HelixError`: what the transport does, and what a refusal means."""
    origin = origin_of(replica)
    head = build_head(
        "POST",
        path,
        origin,
        [("authorization", f"Bearer {replica.api_key}"), ("content-type", "application/json")],
    )
    if call.progress.engine_began_at is None:
        call.progress.engine_began_at = time.perf_counter()
    response = await client.request(origin, head, body, timeouts=_TIMEOUTS, deadline=call.deadline)
    if response.status == 200:
        return response
    try:
        error = await response.read_all(_MAX_ERROR_BYTES)
    finally:
        response.close()
    raise _refusal(response.status, error)


def _refusal(status: int, body: bytes) -> HelixError:
    """In vLLM's words, which have the numbers; its parameters' names are not always the client's."""
    error = read_error(body)
    message = error.message.partition(" (parameter=")[0]
    param = error.param if error.param != "input_tokens" else None
    if status == 400 and _LIMIT_MARK in message:
        return HelixError(ErrorKind.CONTEXT_LENGTH_EXCEEDED, message, param=param)
    return refusal(msgspec.structs.replace(error, message=message, param=param), status)
