"""A client of any OpenAI-compatible server: lists models, asks for chat answers, measures them."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from helixflow.core.errors import ErrorKind, ExitCode, HelixError, UserError
from helixflow.transport.client import HttpClient, HttpResponse, Timeouts, build_head
from helixflow.transport.origin import Origin
from helixflow.transport.sse import EventSplitter, data_of

MAX_BODY_BYTES = 64 * 2**20
MAX_ERROR_BYTES = 64 * 1024
_TIMEOUTS = Timeouts(connect_s=10, first_byte_s=600, idle_s=300)


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One question. `messages` are OpenAI's message objects; None leaves a parameter to the server."""

    model: str
    messages: list[dict[str, str]]
    temperature: float | None = None
    max_tokens: int | None = None
    stream: bool = True


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer. `first_token_s` is None when nothing was streamed; `tokens_counted` when the server reported
    no usage and pieces of the stream were counted instead.
    """

    text: str
    model: str
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int
    tokens_counted: bool
    first_token_s: float | None
    total_s: float

    @property
    def tokens_per_s(self) -> float | None:
        """Speed after the first token; None where there is nothing to measure."""
        if self.first_token_s is None or self.completion_tokens < 2 or self.total_s <= self.first_token_s:
            return None
        return (self.completion_tokens - 1) / (self.total_s - self.first_token_s)


class _Text(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Text | None = None
    message: _Text | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Error(msgspec.Struct):
    message: str | None = None
    code: str | int | None = None


class _Piece(msgspec.Struct):
    model: str | None = None
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: _Error | str | None = None
    # Of a problem document, or of a server made with FastAPI.
    detail: str | None = None


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


class _Name(msgspec.Struct):
    name: str = ""


_piece = msgspec.json.Decoder(_Piece)
_models = msgspec.json.Decoder(_Models)


class ApiClient:
    """One server. `base_url` usually ends in `/v1`; without a path that is assumed. Close it where it was used."""

    def __init__(self, base_url: str, api_key: str | None) -> None:
        """Raises `UserError` (USAGE) for a URL or key that cannot be sent."""
        try:
            self._origin, path = Origin.parse(base_url)
        except ValueError as exc:
            raise UserError(f"base URL {base_url!r}: {exc}", ExitCode.USAGE) from exc
        self._path = path or "/v1"
        self.base_url = f"{self._origin.scheme}://{self._origin.authority}{self._path}"
        self._headers = [("content-type", "application/json"), ("user-agent", "helixflow")]
        self._headers.append(("accept-encoding", "identity"))
        if api_key is not None:
            self._headers.append(("authorization", f"Bearer {api_key}"))
        self._client = HttpClient(max_connections=4)
        self._head("GET", "/models")

    async def list_models(self) -> list[str]:
        """The names that the server offers. Raises `HelixError`."""
        response = await self._send("GET", "/models", b"")
        try:
            body = await response.read_all(MAX_BODY_BYTES)
        finally:
            response.close()
        try:
            return [model.id for model in _models.decode(body).data]
        except msgspec.DecodeError as exc:
            raise _not_openai(self.base_url) from exc

    async def complete(self, request: ChatRequest, on_text: Callable[[str], None]) -> Answer:
        """Asks, passes each piece of text to `on_text` as it comes, and returns the whole. Raises `HelixError`.

        Cancelling closes the connection, which ends the generation.
        """
        begun = time.perf_counter()
        response = await self._send("POST", "/chat/completions", _encode(request))
        collected = _Collected()
        try:
            streamed = response.headers.get(b"content-type", b"").startswith(b"text/event-stream")
            if streamed:
                splitter = EventSplitter()
                while data := await response.read():
                    for event in splitter.feed(data):
                        if (payload := data_of(event)) is not None and payload != b"[DONE]":
                            self._take(payload, collected, on_text, begun)
            else:
                self._take(await response.read_all(MAX_BODY_BYTES), collected, on_text, begun)
        finally:
            response.close()
        usage = collected.usage
        reported = usage.completion_tokens if usage is not None else None
        return Answer(
            text="".join(collected.texts),
            model=collected.model or request.model,
            finish_reason=collected.finish_reason,
            prompt_tokens=usage.prompt_tokens if usage is not None else None,
            completion_tokens=reported if reported is not None else collected.pieces,
            tokens_counted=reported is None,
            first_token_s=collected.first_token_s if streamed else None,
            total_s=time.perf_counter() - begun,
        )

    async def is_helixflow(self) -> bool:
        """Whether the server says that it is one of ours; asked without the key."""
        try:
            status, body = await self._look("/version")
            return status == 200 and msgspec.json.decode(body, type=_Name).name == "helixflow"
        except (HelixError, msgspec.DecodeError):
            return False

    async def is_ready(self) -> bool:
        """Whether a gateway of ours has loaded what it loads at the start. Raises `HelixError`."""
        return (await self._look("/readyz"))[0] == 200

    async def _look(self, target: str) -> tuple[int, bytes]:
        """Status and body of what anybody may read."""
        head = build_head("GET", target, self._origin, [("accept-encoding", "identity")])
        response = await self._request(head, b"")
        try:
            return response.status, await response.read_all(MAX_ERROR_BYTES)
        finally:
            response.close()

    async def close(self) -> None:
        await self._client.close()

    def _take(self, payload: bytes, into: "_Collected", on_text: Callable[[str], None], begun: float) -> None:
        try:
            piece = _piece.decode(payload)
        except msgspec.DecodeError as exc:
            raise _not_openai(self.base_url) from exc
        if piece.error is not None:
            raise HelixError(ErrorKind.UPSTREAM_UNAVAILABLE, _message_of(piece.error) or "The answer broke off.")
        into.model = piece.model or into.model
        into.usage = piece.usage or into.usage
        for choice in (piece.choices or ())[:1]:
            into.finish_reason = choice.finish_reason or into.finish_reason
            text = choice.delta or choice.message or _Text()
            if (text.content or text.reasoning_content) and into.first_token_s is None:
                into.first_token_s = time.perf_counter() - begun
            into.pieces += bool(text.content or text.reasoning_content)
            if text.content:
                into.texts.append(text.content)
                on_text(text.content)

    def _head(self, method: str, target: str) -> bytes:
        try:
            return build_head(method, self._path + target, self._origin, self._headers)
        except ValueError as exc:
            raise UserError(f"the request cannot be sent: {exc}", ExitCode.USAGE) from exc

    async def _send(self, method: str, target: str, body: bytes) -> HttpResponse:
        """The response once its head is there. Raises `HelixError` for every status but 200."""
        response = await self._request(self._head(method, target), body)
        if response.status == 200:
            return response
        try:
            raise _refusal(response.status, await response.read_all(MAX_ERROR_BYTES), self.base_url)
        finally:
            response.close()

    async def _request(self, head: bytes, body: bytes) -> HttpResponse:
        try:
            return await self._client.request(self._origin, head, body, timeouts=_TIMEOUTS)
        except UnicodeError as exc:
            raise HelixError(ErrorKind.UPSTREAM_UNAVAILABLE, f"{self._origin.host!r} is no host name.") from exc
        except HelixError as exc:
            if exc.kind is not ErrorKind.UPSTREAM_UNAVAILABLE:
                raise HelixError(exc.kind, f"{self.base_url}: {exc.message}") from exc
            reason = _reason_of(exc.__cause__)
            raise HelixError(exc.kind, f"nothing answers at {self.base_url}{f' ({reason})' if reason else ''}") from exc


@dataclass(slots=True)
class _Collected:
    """What has come of an answer so far."""

    texts: list[str] = field(default_factory=list)
    model: str = ""
    finish_reason: str | None = None
    usage: _Usage | None = None
    pieces: int = 0
    first_token_s: float | None = None


def _encode(request: ChatRequest) -> bytes:
    fields: dict[str, object] = {"model": request.model, "messages": request.messages}
    if request.temperature is not None:
        fields["temperature"] = request.temperature
    if request.max_tokens is not None:
        fields["max_tokens"] = request.max_tokens
    if request.stream:
        fields["stream"] = True
        fields["stream_options"] = {"include_usage": True}
    return msgspec.json.encode(fields)


def _reason_of(cause: BaseException | None) -> str:
    """Why there is no connection, in the system's words."""
    if isinstance(cause, ConnectionError) and cause.errno:
        return os.strerror(cause.errno)  # asyncio's own text repeats the address
    return (cause.strerror or str(cause)) if isinstance(cause, OSError) else ""


def _message_of(error: _Error | str | None) -> str | None:
    return error if isinstance(error, str) or error is None else error.message


def _refusal(status: int, body: bytes, base_url: str) -> HelixError:
    """The server's own words where it gave some, with what its status means to us."""
    try:
        piece = _piece.decode(body)
    except msgspec.DecodeError:
        piece = _Piece()
    error = piece.error
    message = _message_of(error) or piece.detail or f"{base_url} answered with status {status}."
    if status in (401, 403):
        return HelixError(ErrorKind.INVALID_API_KEY, message)
    if status == 404:
        known = isinstance(error, _Error) and error.code == ErrorKind.MODEL_NOT_FOUND.value
        return HelixError(ErrorKind.MODEL_NOT_FOUND if known else ErrorKind.NOT_FOUND, message)
    if status == 429 or status >= 500:
        return HelixError(ErrorKind.OVERLOADED, message)
    return HelixError(ErrorKind.INVALID_REQUEST, message)


def _not_openai(base_url: str) -> HelixError:
    return HelixError(ErrorKind.UPSTREAM_INVALID, f"{base_url} does not answer as an OpenAI-compatible server does.")
