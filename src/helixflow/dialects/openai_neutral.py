"""OpenAI's chat dialect to the neutral form (requests) and from it (answers and their streams)."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec import Raw

from helixflow.core.call import Usage
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.neutral import (
    AnswerSchema,
    AnySchema,
    AssistantTurn,
    ChatRequest,
    End,
    Event,
    Image,
    Instruction,
    NamedChoice,
    Part,
    ReasoningDelta,
    Text,
    TextDelta,
    ToolArguments,
    ToolResult,
    ToolSpec,
    ToolStart,
    ToolUse,
    Turn,
    UserTurn,
)
from helixflow.dialects.openai_answers import DONE, ChatWriter, CompletionWriter
from helixflow.dialects.openai_chat import (
    AssistantMessage,
    CalledFunction,
    ChatParams,
    Content,
    DeveloperMessage,
    FunctionMessage,
    ImagePart,
    JsonObjectFormat,
    JsonSchemaFormat,
    Message,
    NamedTool,
    RefusalPart,
    SystemMessage,
    TextPart,
    ToolMessage,
    UserMessage,
)

# Read from the typed view, or the platform's own business: for records, accounts and caches, never for the answer.
_READ: Final = frozenset(
    {
        *("model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature"),
        *("top_p", "stop", "tools", "tool_choice", "parallel_tool_calls", "response_format"),
        *("user", "safety_identifier", "metadata", "store", "service_tier", "prompt_cache_key", "prediction"),
        *("prompt_cache_retention",),
    }
)
# Values that ask for nothing, by field: what a client sends that spells out the defaults.
_NOTHING: Final[Mapping[str, frozenset[bytes]]] = {
    "n": frozenset({b"1"}),
    "logprobs": frozenset({b"false"}),
    "top_logprobs": frozenset({b"0"}),
    "logit_bias": frozenset({b"{}"}),
    "presence_penalty": frozenset({b"0", b"0.0"}),
    "frequency_penalty": frozenset({b"0", b"0.0"}),
    "modalities": frozenset({b'["text"]'}),
}


def read_request(params: ChatParams, fields: Mapping[str, Raw]) -> ChatRequest:
    """The request in the neutral form; `fields` are the top-level fields that `params` was read from.

    Raises `HelixError`: UNSUPPORTED for sounds and files, INVALID_VALUE for arguments of a call that are no JSON object
    and for images whose URL is none.
    """
    choice = params.tool_choice
    return ChatRequest(
        turns=_turns(params.messages),
        max_tokens=params.token_limit,
        temperature=params.temperature,
        top_p=params.top_p,
        stop=_stops(params.stop),
        tools=tuple(
            ToolSpec(tool.function.name, tool.function.description, tool.function.parameters, tool.function.strict)
            for tool in params.tools or ()
        ),
        tool_choice=NamedChoice(choice.function.name) if isinstance(choice, NamedTool) else choice or "auto",
        parallel_tool_calls=params.parallel_tool_calls is not False,
        answer_format=_answer_format(params),
        others={name: value for name, value in fields.items() if name not in _READ and _says_something(name, value)},
    )


def _says_something(name: str, value: Raw) -> bool:
    said = bytes(value)
    if said == b"null":
        return False
    nothing = _NOTHING.get(name)
    return nothing is None or said.replace(b" ", b"") not in nothing


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _answer_format(params: ChatParams) -> AnySchema | AnswerSchema | None:
    match params.response_format:
        case JsonObjectFormat():
            return AnySchema()
        case JsonSchemaFormat(json_schema=given):
            if given.schema is None or given.schema is True:
                return AnySchema()
            if given.schema is False:
                raise HelixError(
                    ErrorKind.INVALID_VALUE,
                    "Invalid request: nothing validates against the schema 'false'.",
                    param="response_format",
                )
            return AnswerSchema(given.name, given.schema)
    return None


def _turns(messages: Sequence[Message]) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    names: dict[str, str] = {}
    old_call = ""  # of the interface before tools, where calls have no ids
    for position, message in enumerate(messages):
        where = f"messages[{position}]"
        match message:
            case SystemMessage() | DeveloperMessage():
                turns.append(Instruction(_parts(message.content, where)))
            case UserMessage():
                turns.append(UserTurn(_parts(message.content, where)))
            case AssistantMessage():
                calls = [
                    _tool_use(call.id, call.function, f"{where}.tool_calls[{index}].function")
                    for index, call in enumerate(message.tool_calls or ())
                ]
                if message.function_call is not None:
                    old_call = f"call_{position}"
                    calls.append(_tool_use(old_call, message.function_call, f"{where}.function_call"))
                names.update((call.id, call.name) for call in calls)
                said = _parts(message.content, where) or _parts(message.refusal, where)
                turns.append(AssistantTurn(said, tuple(calls)))
            case ToolMessage():
                call_id = message.tool_call_id
                turns.append(ToolResult(call_id, names.get(call_id, ""), _parts(message.content, where)))
            case FunctionMessage():
                if names.get(old_call) != message.name:
                    raise HelixError(
                        ErrorKind.INVALID_VALUE,
                        "Invalid request: a message with role 'function' must follow an assistant message whose "
                        "'function_call' has the same name.",
                        param=f"{where}.name",
                    )
                turns.append(ToolResult(old_call, message.name, _parts(message.content, where)))
    return tuple(turns)


def _tool_use(call_id: str, function: CalledFunction, where: str) -> ToolUse:
    arguments = function.arguments.strip() or "{}"
    try:
        msgspec.json.decode(arguments, type=dict[str, Raw])
    except (msgspec.DecodeError, ValueError, RecursionError) as exc:
        raise HelixError(
            ErrorKind.INVALID_VALUE,
            f"Invalid request: '{where}.arguments' must be the text of a JSON object.",
            param=f"{where}.arguments",
        ) from exc
    return ToolUse(call_id, function.name, arguments)


def _parts(content: Content | None, where: str) -> tuple[Part, ...]:
    """Empty texts say nothing and are left out."""
    if content is None:
        return ()
    if isinstance(content, str):
        return (Text(content),) if content else ()
    parts: list[Part] = []
    for index, part in enumerate(content):
        match part:
            case TextPart(text=text) | RefusalPart(refusal=text):
                if text:
                    parts.append(Text(text))
            case ImagePart(image_url=image):
                parts.append(_image(image.url, f"{where}.content[{index}].image_url.url"))
            case _:
                raise HelixError(
                    ErrorKind.UNSUPPORTED,
                    "This model reads text and images only.",
                    param=f"{where}.content[{index}]",
                )
    return tuple(parts)


def _image(url: str, where: str) -> Image:
    scheme, _, rest = url.partition(":")
    if scheme in ("http", "https"):
        return Image(url=url)
    media, comma, data = rest.partition(",")
    media_type, _, coding = media.partition(";")
    if scheme != "data" or not comma or coding.rpartition(";")[2] != "base64" or not media_type.startswith("image/"):
        raise HelixError(
            ErrorKind.INVALID_VALUE,
            "Invalid request: an image needs a URL that begins with https:// or data:image/…;base64,.",
            param=where,
        )
    return Image(media_type=media_type, data=data)


class ChatChunks:
    """The events of one answer as the chunks of a stream. Usage and failures are the caller's."""

    def __init__(self, writer: ChatWriter) -> None:
        self._writer = writer
        self._begun = False

    def write(self, event: Event) -> bytes:
        """Empty for what has no chunk of its own."""
        match event:
            case TextDelta(text=text):
                chunk = self._writer.delta(0, b'{"content":%b}' % msgspec.json.encode(text))
            case ReasoningDelta(text=text):
                chunk = self._writer.delta(0, b'{"reasoning_content":%b}' % msgspec.json.encode(text))
            case ToolStart():
                chunk = self._tool(event.index, id=event.id, type="function", function=_function(event.name, ""))
            case ToolArguments():
                chunk = self._tool(event.index, function={"arguments": event.json})
            case End(reason=reason):
                chunk = self._writer.chunk(0, {}, None, reason.value)
            case _:
                return b""
        if self._begun:
            return chunk
        self._begun = True
        return self._writer.role(0) + chunk

    def end(self, usage: Usage | None) -> bytes:
        """What comes after the last event; `usage` where the client wants to know it."""
        return DONE if usage is None else self._writer.usage(usage) + DONE

    def _tool(self, index: int, **fields: Any) -> bytes:
        return self._writer.delta(0, msgspec.json.encode({"tool_calls": [{"index": index, **fields}]}))


class ChatMessage:
    """The events of one answer put together to a message."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, tuple[ToolStart, list[str]]] = {}
        self._end: End | None = None

    def add(self, event: Event) -> None:
        match event:
            case TextDelta(text=text):
                self._text.append(text)
            case ReasoningDelta(text=text):
                self._reasoning.append(text)
            case ToolStart():
                self._calls[event.index] = (event, [])
            case ToolArguments():
                self._calls[event.index][1].append(event.json)
            case End():
                self._end = event

    def choice(self) -> dict[str, Any]:
        """The finished choice."""
        text = "".join(self._text)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            message["content"] = text or None
            message["tool_calls"] = [
                {"id": start.id, "type": "function", "function": _function(start.name, "".join(pieces))}
                for start, pieces in self._calls.values()
            ]
        reason = self._end.reason.value if self._end is not None else "stop"
        return {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}


def _function(name: str, arguments: str) -> dict[str, str]:
    return {"name": name, "arguments": arguments}


class CompletionChunks:
    """The same for the completions dialect: text and its end, nothing else."""

    def __init__(self, writer: CompletionWriter) -> None:
        self._writer = writer

    def write(self, event: Event) -> bytes:
        match event:
            case TextDelta(text=text):
                return self._writer.chunk(0, text, None, None)
            case End(reason=reason):
                return self._writer.chunk(0, "", None, reason.value)
        return b""

    def end(self, usage: Usage | None) -> bytes:
        return DONE if usage is None else self._writer.usage(usage) + DONE


class CompletionText:
    """The events of one completion put together."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._end: End | None = None

    def add(self, event: Event) -> None:
        match event:
            case TextDelta(text=text):
                self._text.append(text)
            case End():
                self._end = event

    def choice(self) -> dict[str, Any]:
        reason = self._end.reason.value if self._end is not None else "stop"
        return {"index": 0, "text": "".join(self._text), "logprobs": None, "finish_reason": reason}
