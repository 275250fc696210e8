"""Chat completions on llama.cpp: what is sent, and how its events become the dialect's."""

import time
from typing import Any

import msgspec
from msgspec import Raw

from helixflow.core.call import Call, Progress
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.openai_answers import ChatWriter, end_of_stream
from helixflow.dialects.openai_chat import ChatParams, DeveloperMessage
from helixflow.dialects.openai_events import UsageBody
from helixflow.engines.llama_cpp.generation import ENGINE_CONTROLS, EVENT, Choice, Event
from helixflow.engines.llama_cpp.merge import Source
from helixflow.engines.llama_cpp.tools import ForcedTool

# Fields that are the platform's business, or that this module sets itself.
_OURS = frozenset(
    {
        *("model", "n", "stream", "stream_options", "max_tokens", "max_completion_tokens", "return_progress"),
        *("user", "safety_identifier", "metadata", "store", "service_tier", "prompt_cache_key", "logprobs"),
        *("top_logprobs", "seed", "modalities", "prediction", *ENGINE_CONTROLS),
    }
)
_TRUE = Raw(b"true")
_CONTENT_START = b'{"choices":[{"finish_reason":null,"index":0,"delta":{"content":"'
_DELTA_START = len(b'{"choices":[{"finish_reason":null,"index":0,"delta":')


def chat_payload(call: Call, params: ChatParams, choice: int, forced: ForcedTool | None) -> dict[str, Raw]:
    """The request for one choice: llama.cpp has slots, not choices, so `n` becomes n requests with their own seeds."""
    payload = {name: value for name, value in call.fields.items() if name not in _OURS and bytes(value) != b"null"}
    payload["stream"] = payload["return_progress"] = _TRUE
    payload["stream_options"] = Raw(b'{"include_usage":true}')
    if (limit := params.token_limit) is not None:
        payload["max_tokens"] = Raw(b"%d" % limit)
    if params.seed is not None:
        payload["seed"] = Raw(b"%d" % ((params.seed + choice) & 0x7FFFFFFF))
    if params.logprobs:
        payload["logprobs"] = _TRUE
        # With top_logprobs 0 llama.cpp gives no log-probabilities at all: ask for one and cut it off again.
        payload["top_logprobs"] = Raw(b"%d" % max(1, params.top_logprobs or 0))
    if any(isinstance(message, DeveloperMessage) for message in params.messages):
        payload["messages"] = _developer_as_system(payload["messages"])
    if forced is not None:
        for name in ("tools", "tool_choice", "parallel_tool_calls"):
            payload.pop(name, None)
        payload["response_format"] = Raw(msgspec.json.encode(forced.response_format()))
    return payload


def _developer_as_system(messages: Raw) -> Raw:
    """Templates know the role under its older name."""
    decoded = msgspec.json.decode(messages, type=list[dict[str, Raw]])
    for message in decoded:
        if bytes(message["role"]) == b'"developer"':
            message["role"] = Raw(b'"system"')
    return Raw(msgspec.json.encode(decoded))


class ChatStream:
    """A streamed chat answer."""

    def __init__(
        self, call: Call, params: ChatParams, source: Source, first: tuple[int, list[bytes]], deployment: str
    ) -> None:
        self._progress = call.progress
        self._progress.first_content_at = time.perf_counter()
        # Known from the start, so that an answer that breaks off is not recorded without its prompt.
        self._progress.usage.prompt_tokens = source.prompt_tokens
        self._source = source
        self._first: tuple[int, list[bytes]] | None = first
        self._include_usage = call.include_usage
        self._logprobs = params.top_logprobs or 0 if params.logprobs else None
        self._writer = ChatWriter(
            f"chatcmpl-{call.call_id}",
            int(time.time()),
            call.public_model,
            source.fingerprint,
            include_usage=call.include_usage,
        )
        # Choices that have begun, and how many of their tokens `progress` counts before the engine reports them.
        self._counted: dict[int, int] = {}
        self._tail = b""
        self._ended = False

    async def read(self) -> bytes:
        while not self._ended:
            if self._first is not None:
                (index, events), self._first = self._first, None
            else:
                index, events = await self._source.read()
            if index < 0:
                self._ended = True
                self._progress.complete = True
                usage = self._writer.usage(self._progress.usage) if self._include_usage else b""
                return usage + end_of_stream(self._progress.resumed)
            out = b"".join([self._shape(index, event) for event in events])
            if out:
                return out
        return b""

    def close(self) -> None:
        self._source.close()

    def _shape(self, index: int, event: bytes) -> bytes:
        if self._logprobs is None and self._tail and event.startswith(_CONTENT_START) and event.endswith(self._tail):
            delta = event[_DELTA_START : -len(self._tail) - 1]
            # Quotes inside JSON strings are escaped, so this says that `content` is all there is.
            if b'"},"' not in delta and b'","' not in delta and index in self._counted:
                self._count(index)
                return self._writer.delta(index, delta)
        decoded = EVENT.decode(event)
        if decoded.usage is not None:
            first = not self._progress.usage.reported
            add_usage(self._progress, decoded.usage, new_prompt=first, counted=self._counted.get(index, 0))
        out = b"".join([self._chunk(index, choice) for choice in decoded.choices])
        if not self._tail and event.startswith(_CONTENT_START):
            more = event.rfind(b'}],"created":')
            self._tail = event[more + 1 :] if more > 0 else b"]}"
        return out

    def _chunk(self, index: int, choice: Choice) -> bytes:
        if choice.finish_reason is not None:
            self._progress.finish_reason = choice.finish_reason
            role = b"" if index in self._counted else self._role(index)
            return role + self._writer.chunk(index, {}, None, choice.finish_reason)
        delta = {name: value for name, value in (choice.delta or {}).items() if name != "role" and value is not None}
        if not delta:
            return b""
        role = b"" if index in self._counted else self._role(index)
        self._count(index)
        logprobs = shape_logprobs(choice, self._logprobs) if self._logprobs is not None else None
        return role + self._writer.chunk(index, delta, logprobs, None)

    def _role(self, index: int) -> bytes:
        self._counted[index] = 0
        return self._writer.role(index)

    def _count(self, index: int) -> None:
        self._counted[index] += 1
        self._progress.usage.completion_tokens += 1


def add_usage(progress: Progress, reported: UsageBody, *, new_prompt: bool, counted: int = 0) -> None:
    """Adds what one generation of a call used: a prompt counts once, completions all, less what is `counted` yet."""
    usage = progress.usage
    if not reported.is_plausible:
        return
    if not usage.reported:
        usage.reported = True
        usage.prompt_tokens = 0  # the report replaces what was known at the start
    usage.completion_tokens += reported.completion_tokens - counted
    if new_prompt:
        usage.prompt_tokens += reported.prompt_tokens
        usage.cached_tokens += reported.cached_tokens


def shape_logprobs(choice: Choice, top: int) -> dict[str, Any] | None:
    """llama.cpp's log-probabilities without its own additions, and with as many alternatives as were asked for."""
    entries = (choice.logprobs or {}).get("content")
    if entries is None:
        return None
    return {
        "content": [_entry(e) | {"top_logprobs": [_entry(t) for t in e["top_logprobs"][:top]]} for e in entries],
        "refusal": None,
    }


def _entry(entry: dict[str, Any]) -> dict[str, Any]:
    return {"token": entry["token"], "logprob": entry["logprob"], "bytes": entry["bytes"]}


class ChatAssembly:
    """Collects the events of one choice into a message."""

    def __init__(self, params: ChatParams) -> None:
        self._top = params.top_logprobs or 0 if params.logprobs else None
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._calls: dict[int, dict[str, Any]] = {}
        self.finish_reason: str | None = None

    def add(self, event: Event) -> None:
        for choice in event.choices:
            self.finish_reason = choice.finish_reason or self.finish_reason
            delta = choice.delta or {}
            if text := delta.get("content"):
                self._text.append(text)
            if text := delta.get("reasoning_content"):
                self._reasoning.append(text)
            for call in delta.get("tool_calls") or ():
                self._add_call(call)
            if self._top is not None and (shaped := shape_logprobs(choice, self._top)):
                self._logprobs += shaped["content"]

    def choice(self, index: int) -> dict[str, Any]:
        """The finished choice. Raises `HelixError` when the engine never said why it ended."""
        if self.finish_reason is None:
            raise HelixError(ErrorKind.UPSTREAM_INVALID, "The model's engine ended its answer without a reason.")
        text = "".join(self._text)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            message["content"] = text or None
            message["tool_calls"] = [self._calls[key] for key in sorted(self._calls)]
        logprobs = {"content": self._logprobs, "refusal": None} if self._top is not None else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": self.finish_reason}

    @property
    def text(self) -> str:
        return "".join(self._text)

    def _add_call(self, piece: dict[str, Any]) -> None:
        function = piece.get("function") or {}
        call = self._calls.setdefault(
            piece.get("index", 0), {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
        )
        call["id"] = call["id"] or piece.get("id") or ""
        call["function"]["name"] += function.get("name") or ""
        call["function"]["arguments"] += function.get("arguments") or ""
