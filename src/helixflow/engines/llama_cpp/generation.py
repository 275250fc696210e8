"""One generation on one replica: always streamed, with progress events, so that a dropped socket frees the slot even
during prefill (llama.cpp notices only when it writes).
"""

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import msgspec
from msgspec import Raw, Struct

from helixflow.core.call import Call, Progress
from helixflow.core.capacity import Lease, Replica, Slots
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.openai_events import UsageBody
from helixflow.engines.addressing import origin_of
from helixflow.engines.replica_faults import is_replica_fault, start_on_some
from helixflow.transport.client import HttpClient, HttpResponse, Timeouts, build_head
from helixflow.transport.sse import EventSplitter, data_of

# Fields of llama.cpp's own that steer the engine rather than the sampling, or change the form of its answers.
ENGINE_CONTROLS = frozenset(
    {
        *("n_cmpl", "n_probs", "n_predict", "n_keep", "n_discard", "id_slot", "cache_prompt", "lora", "return_tokens"),
        *("post_sampling_probs", "response_fields", "timings_per_token", "t_max_predict_ms", "t_max_prompt_ms"),
        *("verbose", "add_generation_prompt", "parse_tool_calls", "reasoning_in_content", "echo", "best_of"),
        *("input_prefix", "input_suffix", "prompt", "input_extra", "min_keep", "backend_sampling"),
    }
)
TIMEOUTS = Timeouts(connect_s=2, first_byte_s=600, idle_s=600)
MAX_ERROR_BYTES = 64 * 1024


class PromptProgress(Struct, frozen=True):
    total: int = 0
    cache: int = 0
    processed: int = 0


class Choice(Struct, frozen=True):
    delta: dict[str, Any] | None = None
    text: str | None = None
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None


class Event(Struct, frozen=True):
    """One event of llama.cpp's chat or completions stream."""

    choices: list[Choice] = []
    usage: UsageBody | None = None
    prompt_progress: PromptProgress | None = None
    error: dict[str, Any] | None = None
    system_fingerprint: str = ""


EVENT = msgspec.json.Decoder(Event)


class Generation:
    """A running generation. Create with `Generation.start`; `close` frees the slot. `broken_off` once its replica is
    lost in the middle of it.
    """

    def __init__(self, response: HttpResponse, lease: Lease) -> None:
        self._response = response
        self._lease = lease
        self._splitter = EventSplitter()
        self._waiting: list[bytes] = []
        self.fingerprint = ""
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.done = False
        self.broken_off = False

    @classmethod
    async def start(
        cls,
        client: HttpClient,
        slots: Slots,
        path: str,
        payload: Mapping[str, Raw],
        *,
        token_limit: int | None,
        call: Call,
    ) -> "Generation":
        """Waits for a slot and for the first event that carries content. Raises what `begin` and `Slots.acquire` do."""
        lease = await slots.acquire(call)
        return await cls.begin(client, lease, path, payload, token_limit=token_limit, call=call)

    @classmethod
    async def begin(
        cls,
        client: HttpClient,
        lease: Lease,
        path: str,
        payload: Mapping[str, Raw],
        *,
        token_limit: int | None,
        call: Call,
    ) -> "Generation":
        """Waits for the first event that carries content; takes over the lease, whatever becomes of it.

        `token_limit` is the most tokens asked for: together with the prompt it must fit the context.
        Raises `HelixError`: CONTEXT_LENGTH_EXCEEDED with both numbers, INVALID_REQUEST for what the engine refuses,
        UPSTREAM_UNAVAILABLE when the replica fails.
        """
        progress = call.progress
        if progress.engine_began_at is None:
            progress.engine_began_at = time.perf_counter()
        generation: Generation | None = None
        try:
            body = msgspec.json.encode(payload)
            response = await request(client, lease.replica, path, body, call.deadline, streamed=True)
            generation = cls(response, lease)
            if response.status != 200:
                raise await refusal(response)
            await generation._read_to_content(lease.replica, token_limit, progress)
        except BaseException as exc:
            if isinstance(exc, HelixError) and exc.kind is ErrorKind.CONTEXT_LENGTH_EXCEEDED:
                exc.param = "prompt" if path == "/v1/completions" else "messages"
            if generation is not None:
                generation._response.close()
            lease.release(failed=is_replica_fault(exc))
            raise
        return generation

    async def read(self) -> list[bytes]:
        """The next events (their JSON), progress left out; an empty list at the end.

        Raises `HelixError` UPSTREAM_UNAVAILABLE when the engine breaks off.
        """
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            return waiting
        while not self.done:
            data = await self._receive()
            events = self._payloads(data)
            if events:
                return events
        return []

    @property
    def replica_id(self) -> str:
        return self._lease.replica.replica_id

    def close(self) -> None:
        """Ends the generation if it still runs and gives the slot back. Idempotent."""
        self._response.close()
        self._lease.release()

    async def _receive(self) -> bytes:
        try:
            data = await self._response.read()
        except HelixError as exc:
            self._lease.release(failed=True)
            if exc.kind is ErrorKind.DEADLINE:
                raise
            self.broken_off = True
            raise HelixError(
                ErrorKind.UPSTREAM_UNAVAILABLE, "The model's engine stopped in the middle of the answer."
            ) from exc
        if not data and not self.done:
            self._lease.release(failed=True)
            self.broken_off = True
            raise HelixError(ErrorKind.UPSTREAM_UNAVAILABLE, "The model's engine stopped in the middle of the answer.")
        return data

    def _payloads(self, data: bytes) -> list[bytes]:
        payloads: list[bytes] = []
        for event in self._splitter.feed(data):
            payload = data_of(event)
            if payload == b"[DONE]":
                self.done = True
                self._lease.charge(len(payloads))
                self._lease.release()
            elif payload is not None and b'"prompt_progress":{' not in payload[-200:]:
                if payload.startswith(b'{"error":'):
                    self._lease.release()
                    raise engine_error(500, payload)
                payloads.append(payload)
        if not self.done:
            self._lease.charge(len(payloads))
        return payloads

    async def _read_to_content(self, replica: Replica, token_limit: int | None, progress: Progress) -> None:
        checked = False
        while not self._waiting:
            data = await self._receive()
            for event in self._splitter.feed(data):
                payload = data_of(event)
                if payload is None:
                    continue
                if payload == b"[DONE]":
                    self.done = True
                    self._lease.release()
                    return
                if payload.startswith(b'{"error":'):
                    raise engine_error(500, payload)
                decoded = _decode(payload)
                self.fingerprint = decoded.system_fingerprint or self.fingerprint
                if decoded.prompt_progress is not None:
                    self.prompt_tokens = decoded.prompt_progress.total
                    self.cached_tokens = decoded.prompt_progress.cache
                    if not checked:
                        check_context(decoded.prompt_progress.total, token_limit, replica.context)
                        checked = True
                        # What is cached costs the engine nothing.
                        self._lease.charge(max(0, self.prompt_tokens - self.cached_tokens))
                        # A client that leaves now leaves this to be paid.
                        progress.usage.prompt_tokens = progress.usage.prompt_tokens or self.prompt_tokens
                elif _has_content(decoded) or self._waiting:
                    self._waiting.append(payload)
                    self._lease.charge(1)


async def start_generation(
    client: HttpClient,
    slots: Slots,
    path: str,
    payload: Mapping[str, Raw],
    *,
    token_limit: int | None,
    call: Call,
) -> Generation:
    """`Generation.start` on a replica that does not fail: the client has seen nothing yet."""
    start = partial(Generation.start, client, slots, path, payload, token_limit=token_limit, call=call)
    return await start_on_some(start, slots)


async def request(
    client: HttpClient,
    replica: Replica,
    path: str,
    body: bytes,
    deadline: float,
    *,
    streamed: bool = False,
) -> HttpResponse:
    """POSTs JSON to a replica. Raises `HelixError` UPSTREAM_UNAVAILABLE when it cannot be reached.

    llama.cpp closes the connection after every `streamed` answer, whatever its `Keep-Alive` says. Told so, the client
    does not send the request that has waited for the slot on a connection that is being closed (seen: 9 of 10).
    """
    origin = origin_of(replica)
    head = build_head(
        "POST",
        path,
        origin,
        [("authorization", f"Bearer {replica.api_key}"), ("content-type", "application/json")],
        keep_alive=not streamed,
    )
    return await client.request(origin, head, body, timeouts=TIMEOUTS, deadline=deadline)


async def check_bias(bias: Mapping[str, float], slots: Slots, deadline: float) -> None:
    """Raises `HelixError` INVALID_VALUE for keys that are no token ids of the model; llama.cpp would ignore them."""
    vocabulary = (await slots.any_replica(deadline)).vocabulary
    for key in bias:
        if vocabulary and (len(key) > 9 or int(key) >= vocabulary):
            raise HelixError(
                ErrorKind.INVALID_VALUE,
                f"Invalid request: 'logit_bias' has the token id {key[:20]}; this model's ids end at {vocabulary - 1}.",
                param="logit_bias",
            )


def check_context(prompt_tokens: int, token_limit: int | None, context: int) -> None:
    """Raises `HelixError` CONTEXT_LENGTH_EXCEEDED with the numbers when prompt and answer cannot both fit."""
    wanted = token_limit or 0
    if prompt_tokens + wanted > context or prompt_tokens >= context:
        answer = f" and {wanted} for the answer" if wanted else ""
        raise HelixError(
            ErrorKind.CONTEXT_LENGTH_EXCEEDED,
            f"This model's maximum context length is {context} tokens, but the request needs {prompt_tokens + wanted} "
            f"({prompt_tokens} in the prompt{answer}). Shorten the prompt or ask for fewer tokens.",
        )


async def refusal(response: HttpResponse) -> HelixError:
    """The error behind an answer that is not 200."""
    return engine_error(response.status, await response.read_all(MAX_ERROR_BYTES))


class _EngineError(Struct, frozen=True):
    message: str = ""
    type: str = ""
    n_prompt_tokens: int = 0
    n_ctx: int = 0


class _EngineErrorBody(Struct, frozen=True):
    error: _EngineError = _EngineError()


_ERROR = msgspec.json.Decoder(_EngineErrorBody)
_UNSUPPORTED_MARKS = ("is not supported", "not supported by", "does not support")


def engine_error(status: int, body: bytes) -> HelixError:
    """llama.cpp's error (integer codes, server faults for what the caller did) as one of ours."""
    try:
        error = _ERROR.decode(body).error
    except (msgspec.DecodeError, RecursionError):
        error = _EngineError()
    if error.type == "exceed_context_size_error":
        try:
            check_context(error.n_prompt_tokens, None, error.n_ctx)
        except HelixError as exc:
            return exc
    message = error.message.split("\n", 1)[0].removesuffix(".")
    if "Context size has been exceeded" in message:
        # The slots share one KV cache, and together they need more than it holds: nobody's fault, and it passes.
        return HelixError(
            ErrorKind.OVERLOADED,
            "The model's memory for running answers is full; try again shortly or ask for fewer tokens.",
            retry_after_s=2,
        )
    if any(mark in message for mark in _UNSUPPORTED_MARKS):
        return HelixError(ErrorKind.UNSUPPORTED, f"The model cannot serve this request: {message}.")
    if status == 400:
        return HelixError(ErrorKind.INVALID_REQUEST, f"The model's engine refused the request: {message or 'invalid'}.")
    if status == 503:
        return HelixError(ErrorKind.LOADING, "The model is still loading; try again shortly.", retry_after_s=2)
    return HelixError(ErrorKind.UPSTREAM_UNAVAILABLE, "The model's engine failed.")


def _decode(payload: bytes) -> Event:
    try:
        return EVENT.decode(payload)
    except (msgspec.DecodeError, RecursionError) as exc:
        raise HelixError(ErrorKind.UPSTREAM_INVALID, "The model's engine sent an event that is not valid.") from exc


def _has_content(event: Event) -> bool:
    for choice in event.choices:
        if choice.finish_reason is not None or choice.text:
            return True
        if choice.delta and any(choice.delta.get(k) for k in ("content", "tool_calls", "reasoning_content")):
            return True
    return False
