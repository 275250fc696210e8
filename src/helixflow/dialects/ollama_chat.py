"""Ollama's own API, `POST /api/chat`: requests from the neutral form, streamed answers to it.

https://docs.ollama.com/api/chat. Prompts that are too long are refused rather than cut (`truncate`), and answers end at
the context instead of forgetting its beginning (`shift`); releases before 0.12.4 do not know either word. Not possible,
and refused: several choices, log-probabilities, biases, forcing a call or allowing one only, pictures by their URL.
"""

from collections.abc import Mapping
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
    Turn,
    UserTurn,
    refuse_rest,
    unsupported,
)
from helixflow.dialects.provider_errors import error_of, event_refusal
from helixflow.transport.lines import LineSplitter

# OpenAI's names of options that have the same meaning here.
OPTIONS: Final = frozenset({"seed", "presence_penalty", "frequency_penalty"})
# Fields of Ollama's own, which clients may send beside OpenAI's.
_PASSED: Final = frozenset({"think", "keep_alive"})
_EFFORTS: Final = frozenset({"low", "medium", "high"})


def write_request(request: ChatRequest, model: str, context: int) -> bytes:
    """The body of `POST /api/chat`, always streamed. `context` is the size that the model is loaded with, tokens.

    Raises `HelixError` UNSUPPORTED for what the API cannot do, naming the parameter.
    """
    refuse_rest(request.others, OPTIONS | _PASSED | {"reasoning_effort"})
    body: dict[str, Any] = {
        "model": model,
        "messages": [_message(turn, f"messages[{position}]") for position, turn in enumerate(request.turns)],
        "stream": True,
        "truncate": False,
        "shift": False,
        "options": write_options(
            context,
            request.others,
            num_predict=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            stop=request.stop or None,
        ),
    }
    if tools := _tools(request):
        body["tools"] = tools
    match request.answer_format:
        case AnySchema():
            body["format"] = "json"
        case AnswerSchema(schema=schema):
            body["format"] = schema
    if (effort := request.others.get("reasoning_effort")) is not None:
        body["think"] = _think(effort)
    body.update({name: value for name, value in request.others.items() if name in _PASSED})
    return msgspec.json.encode(body)


def write_options(context: int, others: Mapping[str, Raw], **options: Any) -> dict[str, Any]:
    """The `options` object; those that are None are left out."""
    given = {"num_ctx": context, **{name: value for name, value in others.items() if name in OPTIONS}, **options}
    return {name: value for name, value in given.items() if value is not None}


def _message(turn: Turn, where: str) -> dict[str, Any]:
    match turn:
        case Instruction(parts=parts):
            return {"role": "system", **_content(parts, where)}
        case UserTurn(parts=parts):
            return {"role": "user", **_content(parts, where)}
        case ToolResult(call_id=call_id, name=name, parts=parts):
            return {"role": "tool", "tool_name": name, "tool_call_id": call_id, **_content(parts, where)}
        case AssistantTurn(parts=parts, calls=calls):
            message = {"role": "assistant", **_content(parts, where)}
            if calls:
                message["tool_calls"] = [
                    {
                        "id": call.id,
                        "function": {"index": index, "name": call.name, "arguments": Raw(call.arguments.encode())},
                    }
                    for index, call in enumerate(calls)
                ]
            return message


def _content(parts: tuple[Part, ...], where: str) -> dict[str, Any]:
    texts, images = [], []
    for part in parts:
        match part:
            case Text(text=text):
                texts.append(text)
            case Image(url="", data=data):
                images.append(data)
            case Image():
                raise unsupported(f"{where}.content", "send the image itself (data:image/…;base64,) instead of its URL")
    content: dict[str, Any] = {"content": "\n".join(texts)}
    if images:
        content["images"] = images
    return content


def _tools(request: ChatRequest) -> list[dict[str, Any]]:
    if not request.tools or request.tool_choice == "none":
        return []
    if request.tool_choice == "required" or isinstance(request.tool_choice, NamedChoice):
        raise unsupported("tool_choice", "it decides itself whether to call a tool ('auto')")
    if not request.parallel_tool_calls:
        raise unsupported("parallel_tool_calls")
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description or "",
                "parameters": {"type": "object", "properties": {}, **(tool.parameters or {})},
            },
        }
        for tool in request.tools
    ]


def _think(effort: Raw) -> str | bool:
    said = msgspec.json.decode(effort)
    if said == "none":
        return False
    if said in _EFFORTS:
        return str(said)
    raise unsupported("reasoning_effort", "use one of none, low, medium, high")


class _Function(Struct, frozen=True):
    name: str = ""
    arguments: Raw = Raw(b"{}")


class _Call(Struct, frozen=True):
    id: str = ""
    function: _Function = _Function()


class _Message(Struct, frozen=True):
    content: str | None = None
    thinking: str | None = None
    tool_calls: list[_Call] | None = None


class _Line(Struct, frozen=True):
    """A line of `/api/chat` (`message`) or of `/api/generate` (`response`)."""

    message: _Message | None = None
    response: str | None = None
    thinking: str | None = None
    done: bool = False
    done_reason: str | None = None
    prompt_eval_count: int | None = None
    eval_count: int | None = None
    error: Any = None


_LINE: Final = msgspec.json.Decoder(_Line)


class OllamaReader:
    """Implements `AnswerReader` for `/api/chat` and `/api/generate`. Calls without an id get one that begins with
    `id_prefix`.
    """

    def __init__(self, id_prefix: str) -> None:
        self._splitter = LineSplitter()
        self._id_prefix = id_prefix
        self._calls = 0
        self.done = False

    def feed(self, data: bytes) -> list[Event]:
        events: list[Event] = []
        try:
            for line in self._splitter.feed(data):
                if not self.done:
                    self._read(_LINE.decode(line), events)
        except HelixError as exc:
            events.append(Failed(exc))
        except (msgspec.DecodeError, ValueError, RecursionError) as exc:
            error = HelixError(ErrorKind.UPSTREAM_INVALID, "The model's server sent a line that is not valid.")
            error.__cause__ = exc
            events.append(Failed(error))
        return events

    def _read(self, line: _Line, events: list[Event]) -> None:
        if line.error is not None:
            raise event_refusal(error_of(line.error))
        message = line.message
        if thinking := message.thinking if message is not None else line.thinking:
            events.append(ReasoningDelta(thinking))
        if text := message.content if message is not None else line.response:
            events.append(TextDelta(text))
        for call in (message.tool_calls if message is not None else None) or ():
            self._add_call(call, events)
        if line.done:
            self.done = True
            if line.prompt_eval_count is not None or line.eval_count is not None:
                events.append(Tokens(line.prompt_eval_count or 0, line.eval_count or 0))
            events.append(End(self._stop_reason(line.done_reason)))

    def _add_call(self, call: _Call, events: list[Event]) -> None:
        index = self._calls
        self._calls += 1
        events.append(ToolStart(index, call.id or f"{self._id_prefix}{index}", call.function.name))
        arguments = bytes(call.function.arguments).decode()
        if arguments == "null":
            arguments = "{}"
        if not arguments.startswith("{"):
            raise HelixError(
                ErrorKind.UPSTREAM_INVALID, "The model's server sent a call whose arguments are no object."
            )
        events.append(ToolArguments(index, arguments))

    def _stop_reason(self, reason: str | None) -> StopReason:
        if reason == "length":
            return StopReason.LENGTH
        return StopReason.TOOL_CALLS if self._calls else StopReason.END
