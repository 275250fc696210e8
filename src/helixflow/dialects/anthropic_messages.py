"""Anthropic's Messages API: requests from the neutral form, streamed answers to it.

https://platform.claude.com/docs/en/api/messages and …/build-with-claude/streaming. Where it has no place for what
OpenAI's dialect can say, we do as Anthropic's own OpenAI-compatible endpoint does (…/docs/en/api/openai-sdk) or refuse:

- system and developer messages, wherever they stand, are joined by a line feed and go before the conversation;
- a temperature above 1 is sent as 1; names of speakers and the detail of images are not sent;
- a JSON schema for the answer is sent as `output_config.format`; JSON without a schema is refused, as are `n`, `seed`,
  `logprobs`, penalties, biases and everything that is not known.
"""

import re
from typing import Any, Final

import msgspec
from msgspec import Raw, Struct

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.neutral import (
    AnswerSchema,
    AnySchema,
    AssistantTurn,
    ChatRequest,
    End,
    Event,
    Failed,
    Image,
    Instruction,
    NamedChoice,
    Part,
    ReasoningDelta,
    StopReason,
    Text,
    TextDelta,
    Tokens,
    ToolArguments,
    ToolResult,
    ToolStart,
    ToolUse,
    UserTurn,
    refuse_rest,
    unsupported,
)
from helixflow.dialects.provider_errors import error_of, event_refusal
from helixflow.transport.sse import EventSplitter, data_of

# Fields of Anthropic's own, which clients may send beside OpenAI's.
_PASSED: Final = frozenset({"thinking", "top_k", "cache_control"})
_MAX_TEMPERATURE: Final = 1.0
_NOT_IN_IDS: Final = re.compile(r"[^A-Za-z0-9_-]")
_STOP_REASONS: Final = {
    "max_tokens": StopReason.LENGTH,
    "model_context_window_exceeded": StopReason.LENGTH,
    "tool_use": StopReason.TOOL_CALLS,
    "refusal": StopReason.CONTENT_FILTER,
}


def write_request(request: ChatRequest, model: str, default_max_tokens: int) -> bytes:
    """The body of `POST /messages`, always streamed: a server sees at once that its client has gone.

    `default_max_tokens` is for requests that do not limit their answer: this API demands it.
    Raises `HelixError` UNSUPPORTED for what the API cannot do, naming the parameter.
    """
    refuse_rest(request.others, _PASSED)
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": request.max_tokens or default_max_tokens,
        "messages": _messages(request),
        "stream": True,
    }
    if system := _system(request):
        body["system"] = system
    if request.temperature is not None:
        body["temperature"] = min(request.temperature, _MAX_TEMPERATURE)
    if request.top_p is not None:
        body["top_p"] = request.top_p
    if request.stop:
        body["stop_sequences"] = request.stop
    if request.tools:
        body["tools"] = [
            _without_none(
                name=tool.name,
                description=tool.description,
                input_schema={"type": "object", **(tool.parameters or {})},
                strict=tool.strict or None,
            )
            for tool in request.tools
        ]
        if (choice := _tool_choice(request)) is not None:
            body["tool_choice"] = choice
    match request.answer_format:
        case AnswerSchema(schema=schema):
            body["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
        case AnySchema():
            raise unsupported("response_format", "give a JSON schema (type 'json_schema')")
    body.update(request.others)
    return msgspec.json.encode(body)


def _system(request: ChatRequest) -> str:
    texts = []
    for position, turn in enumerate(request.turns):
        if isinstance(turn, Instruction):
            for part in turn.parts:
                if not isinstance(part, Text):
                    raise unsupported(f"messages[{position}].content", "images belong into user messages")
                texts.append(part.text)
    return "\n".join(texts)


def _messages(request: ChatRequest) -> list[dict[str, Any]]:
    """Turns of the same role become one message: all results of parallel calls must be in the one after them."""
    messages: list[dict[str, Any]] = []
    for turn in request.turns:
        match turn:
            case Instruction():
                continue
            case UserTurn(parts=parts):
                role, blocks = "user", [_block(part) for part in parts]
            case AssistantTurn(parts=parts, calls=calls):
                role, blocks = "assistant", [*(_block(part) for part in parts), *(_tool_use(call) for call in calls)]
            case ToolResult(call_id=call_id, parts=parts):
                result = {"type": "tool_result", "tool_use_id": _id(call_id)}
                role, blocks = "user", [{**result, **({"content": [_block(part) for part in parts]} if parts else {})}]
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += blocks
        elif blocks:
            messages.append({"role": role, "content": blocks})
    return messages


def _block(part: Part) -> dict[str, Any]:
    match part:
        case Text(text=text):
            return {"type": "text", "text": text}
        case Image(url="", media_type=media_type, data=data):
            return {"type": "image", "source": {"type": "base64", "media_type": media_type, "data": data}}
        case Image(url=url):
            return {"type": "image", "source": {"type": "url", "url": url}}


def _tool_use(call: ToolUse) -> dict[str, Any]:
    return {"type": "tool_use", "id": _id(call.id), "name": call.name, "input": Raw(call.arguments.encode())}


def _id(call_id: str) -> str:
    """Other servers' ids may have characters that are refused here; both ends of a call change alike."""
    return _NOT_IN_IDS.sub("_", call_id) or "_"


def _tool_choice(request: ChatRequest) -> dict[str, Any] | None:
    match request.tool_choice:
        case NamedChoice(name=name):
            choice: dict[str, Any] = {"type": "tool", "name": name}
        case "none":
            return {"type": "none"}
        case "required":
            choice = {"type": "any"}
        case _:
            if request.parallel_tool_calls:
                return None
            choice = {"type": "auto"}
    if not request.parallel_tool_calls:
        choice["disable_parallel_tool_use"] = True
    return choice


def _without_none(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


class _Usage(Struct, frozen=True):
    """`input_tokens` are those that no cache had and none took."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None


class _Message(Struct, frozen=True):
    usage: _Usage = _Usage()


class _Block(Struct, frozen=True):
    type: str = ""
    id: str = ""
    name: str = ""
    text: str = ""
    thinking: str = ""
    input: dict[str, Raw] | None = None


class _Delta(Struct, frozen=True):
    type: str = ""
    text: str = ""
    thinking: str = ""
    partial_json: str = ""
    stop_reason: str | None = None


class _StreamEvent(Struct, frozen=True):
    """Any event of a stream; kinds that are not known, and blocks and deltas of such kinds, are passed over."""

    type: str
    index: int = 0
    message: _Message | None = None
    content_block: _Block | None = None
    delta: _Delta | None = None
    usage: _Usage | None = None
    error: Any = None


_EVENT: Final = msgspec.json.Decoder(_StreamEvent)


class MessagesReader:
    """Implements `AnswerReader`."""

    def __init__(self) -> None:
        self._splitter = EventSplitter()
        # The calls among the content blocks: by the block's index their own, and whether they had arguments yet.
        self._calls: dict[int, tuple[int, bool]] = {}
        self._prompt = self._cached = 0
        self.done = False

    def feed(self, data: bytes) -> list[Event]:
        events: list[Event] = []
        try:
            for event in self._splitter.feed(data):
                payload = data_of(event)
                if payload is not None and not self.done:
                    self._read(_EVENT.decode(payload), events)
        except HelixError as exc:
            events.append(Failed(exc))
        except (msgspec.DecodeError, ValueError, RecursionError) as exc:
            error = HelixError(ErrorKind.UPSTREAM_INVALID, "The model's server sent an event that is not valid.")
            error.__cause__ = exc
            events.append(Failed(error))
        return events

    def _read(self, event: _StreamEvent, events: list[Event]) -> None:
        match event.type:
            case "content_block_delta" if event.delta is not None:
                self._read_delta(event.index, event.delta, events)
            case "content_block_start" if event.content_block is not None:
                self._start_block(event.index, event.content_block, events)
            case "content_block_stop":
                self._stop_block(event.index, events)
            case "message_start" if event.message is not None:
                events.append(self._tokens(event.message.usage, final=False))
            case "message_delta":
                if event.usage is not None:
                    events.append(self._tokens(event.usage, final=True))
                if event.delta is not None and event.delta.stop_reason is not None:
                    events.append(End(_STOP_REASONS.get(event.delta.stop_reason, StopReason.END)))
            case "message_stop":
                self.done = True
            case "error":
                raise event_refusal(error_of(event.error))

    def _read_delta(self, index: int, delta: _Delta, events: list[Event]) -> None:
        if delta.text:
            events.append(TextDelta(delta.text))
        elif delta.thinking:
            events.append(ReasoningDelta(delta.thinking))
        elif delta.partial_json and index in self._calls:
            call, _ = self._calls[index]
            self._calls[index] = (call, True)
            events.append(ToolArguments(call, delta.partial_json))

    def _start_block(self, index: int, block: _Block, events: list[Event]) -> None:
        if block.type == "tool_use":
            call = len(self._calls)
            self._calls[index] = (call, bool(block.input))
            events.append(ToolStart(call, block.id, block.name))
            if block.input:
                events.append(ToolArguments(call, msgspec.json.encode(block.input).decode()))
        elif block.text:
            events.append(TextDelta(block.text))
        elif block.thinking:
            events.append(ReasoningDelta(block.thinking))

    def _stop_block(self, index: int, events: list[Event]) -> None:
        """A call without arguments has an empty object of them, in OpenAI's dialect too."""
        call, has_arguments = self._calls.get(index, (0, True))
        if not has_arguments:
            self._calls[index] = (call, True)
            events.append(ToolArguments(call, "{}"))

    def _tokens(self, usage: _Usage, *, final: bool) -> Tokens:
        """The first event tells the prompt, the last one the answer, and maybe both anew."""
        if usage.input_tokens is not None:
            read, written = usage.cache_read_input_tokens or 0, usage.cache_creation_input_tokens or 0
            self._prompt, self._cached = usage.input_tokens + read + written, read
        return Tokens(self._prompt, usage.output_tokens or 0, self._cached, final=final)
