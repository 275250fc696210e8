"""Any server that speaks OpenAI's API: real providers, vLLM, other gateways. Their bytes pass as they came, see
`dialects.openai_identity`.
"""

import re
import time
from collections.abc import Mapping

import msgspec
from msgspec import Raw

from helixflow.core.call import Call, Operation, Stream
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.openai_identity import Rename, StreamEditor, edit_answer
from helixflow.engines.answers import WholeAnswer
from helixflow.engines.counting import TokenCounter, answer_text
from helixflow.transport.client import HttpClient, HttpResponse, Timeouts, build_head
from helixflow.transport.origin import Origin

MAX_ANSWER_BYTES = 64 * 2**20
MAX_ERROR_BYTES = 64 * 1024
_USAGE_OPTIONS = Raw(b'{"include_usage":true}')
_RETRY_AFTER_MAX_S = 600.0
_CODE = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


class OpenAIEngine:
    """One deployment on an upstream server."""

    def __init__(
        self,
        client: HttpClient,
        *,
        deployment: str,
        public_model: str,
        base_url: str,
        model: str,
        api_key: str | None,
        headers: Mapping[str, str],
        timeouts: Timeouts,
    ) -> None:
        """`model` is the upstream's name for it. Raises `ValueError` for a base URL or header that cannot be sent."""
        self._client = client
        self._deployment = deployment
        self._public_model = msgspec.json.encode(public_model)
        self._model = Raw(msgspec.json.encode(model))
        self._timeouts = timeouts
        self._origin, base_path = Origin.parse(base_url)
        common = {"content-type": "application/json", "accept-encoding": "identity", "user-agent": "helixflow"}
        if api_key is not None:
            common["authorization"] = f"Bearer {api_key}"
        common.update({name.lower(): value for name, value in headers.items()})
        self._heads = {
            operation: build_head("POST", f"{base_path}/{operation.value}", self._origin, common.items())
            for operation in Operation
        }
        self._counter = TokenCounter(client, self._origin, list(common.items()), model)

    async def open(self, call: Call) -> Stream:
        """Returns when the first content is at hand (streams) or the whole answer is (otherwise)."""
        call.progress.engine_began_at = time.perf_counter()
        response = await self._client.request(
            self._origin,
            self._heads[call.operation],
            self._request_body(call),
            timeouts=self._timeouts,
            deadline=call.deadline,
        )
        try:
            if response.status != 200:
                raise await self._refusal(response)
            progress = call.progress
            rename = Rename(self._public_model, call.operation, call.call_id)
            if not call.stream:
                body = await response.read_all(MAX_ANSWER_BYTES)
                edited = edit_answer(body, rename, progress)
                usage = progress.usage
                if not usage.reported or (not usage.completion_tokens and call.operation is not Operation.EMBEDDINGS):
                    await self._count(call, body)
                return WholeAnswer(edited)
            editor = StreamEditor(rename, include_usage=call.include_usage, progress=progress)
            first = b""
            while not editor.started:
                data = await response.read()
                if not data:
                    raise HelixError(
                        ErrorKind.UPSTREAM_INVALID, "The model's server ended the stream before its first word."
                    )
                first += editor.feed(data)
            return _EditedStream(response, editor, first, call, self._counter)
        except BaseException:
            response.close()
            raise

    async def _count(self, call: Call, body: bytes) -> None:
        """What a whole answer's usage does not tell."""
        text = answer_text(body)
        if text or not call.progress.usage.reported:
            call.progress.usage.reported = False
            await self._counter.fill(call, text)

    def _request_body(self, call: Call) -> bytes:
        fields = call.fields.copy()
        fields["model"] = self._model
        if call.stream:
            fields["stream_options"] = _stream_options(fields.get("stream_options"))
        return msgspec.json.encode(fields)

    async def _refusal(self, response: HttpResponse) -> HelixError:
        """What an upstream's error status means for our caller: its faults are not the caller's."""
        status = response.status
        body = await response.read_all(MAX_ERROR_BYTES)
        if status in (400, 404, 409, 413, 415, 422):
            upstream = _error_of(body)
            if status == 404:
                return HelixError(
                    ErrorKind.UPSTREAM_UNAVAILABLE, "The model's server does not know this model or endpoint."
                )
            kind = ErrorKind.BODY_TOO_LARGE if status == 413 else ErrorKind.INVALID_REQUEST
            if upstream.code == ErrorKind.CONTEXT_LENGTH_EXCEEDED.value:
                kind = ErrorKind.CONTEXT_LENGTH_EXCEEDED
            message = upstream.message or "The model's server refused the request as invalid."
            # Some send the status again; it stands in records of ours, so not just anything will do.
            code = upstream.code if isinstance(upstream.code, str) and _CODE.fullmatch(upstream.code) else None
            return HelixError(kind, message, param=upstream.param, code=code)
        if status in (401, 403):
            return HelixError(ErrorKind.UPSTREAM_UNAVAILABLE, "The model's server refused the gateway's credentials.")
        retry_after = _retry_after(response.headers.get(b"retry-after"))
        if status == 429:
            return HelixError(
                ErrorKind.RATE_LIMITED, "The model's server is limiting requests.", retry_after_s=retry_after or 1.0
            )
        if status in (503, 529):
            return HelixError(ErrorKind.OVERLOADED, "The model's server is overloaded.", retry_after_s=retry_after)
        if status in (408, 504):
            return HelixError(ErrorKind.DEADLINE, "The model's server did not answer in time.")
        return HelixError(ErrorKind.UPSTREAM_UNAVAILABLE, f"The model's server failed with status {status}.")


class _EditedStream:
    def __init__(
        self, response: HttpResponse, editor: StreamEditor, first: bytes, call: Call, counter: TokenCounter
    ) -> None:
        self._response = response
        self._editor = editor
        self._first = first
        self._call = call
        self._counter = counter

    async def read(self) -> bytes:
        piece = await self._read()
        progress = self._call.progress
        if progress.complete and piece and not progress.usage.reported:
            # The events were counted as they came.
            await self._counter.fill(self._call, None)
        return piece

    async def _read(self) -> bytes:
        if self._first:
            first, self._first = self._first, b""
            return first
        editor = self._editor
        while editor.failure is None:
            try:
                data = await self._response.read()
            except HelixError:
                if editor.done:  # the answer is whole, only the end of the body was bad
                    return b""
                raise
            if not data:
                if not editor.ended_cleanly:
                    raise HelixError(
                        ErrorKind.UPSTREAM_INVALID, "The model's server broke off in the middle of its answer."
                    )
                return b""
            out = editor.feed(data)
            if out:
                return out
        raise editor.failure

    def close(self) -> None:
        self._response.close()


class _UpstreamError(msgspec.Struct, frozen=True):
    message: str | None = None
    param: str | None = None
    code: str | int | None = None


class _UpstreamErrorBody(msgspec.Struct, frozen=True):
    error: _UpstreamError | str = _UpstreamError()


_ERROR_BODY = msgspec.json.Decoder(_UpstreamErrorBody, strict=False)


def _error_of(body: bytes) -> _UpstreamError:
    try:
        error = _ERROR_BODY.decode(body).error
    except (msgspec.DecodeError, RecursionError):
        return _UpstreamError()
    return _UpstreamError(message=error) if isinstance(error, str) else error


def _stream_options(options: Raw | None) -> Raw:
    """The client's stream options with `include_usage` on: we always learn the usage."""
    if options is None or bytes(options) == b"null":
        return _USAGE_OPTIONS
    merged = msgspec.json.decode(options, type=dict[str, Raw])
    merged["include_usage"] = Raw(b"true")
    return Raw(msgspec.json.encode(merged))


def _retry_after(value: bytes | None) -> float | None:
    """Seconds; None for a date or nonsense."""
    if value is None or not value.isdigit():
        return None
    return min(float(value), _RETRY_AFTER_MAX_S)
