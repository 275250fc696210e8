"""One form for chat, between dialects: a request, and an answer as the events it is made of.

A dialect is read into it and written from it, so that n dialects need n modules and not n². What a dialect cannot say
is refused by whoever writes that dialect, with the name of the parameter; nothing is left out in silence.
"""

from collections.abc import Mapping
from enum import Enum
from typing import Any, Literal, Protocol

from msgspec import Raw, Struct

from helixflow.core.errors import ErrorKind, HelixError


class Text(Struct, frozen=True, gc=False):
    """Part of a message."""

    text: str


class Image(Struct, frozen=True, gc=False):
    """Part of a message: a picture at `url`, or one that is inlined (`data` in base64, of `media_type`)."""

    url: str = ""
    media_type: str = ""
    data: str = ""


Part = Text | Image


class ToolUse(Struct, frozen=True, gc=False):
    """A call that the model has made. `arguments` is the text of a JSON object."""

    id: str
    name: str
    arguments: str


class Instruction(Struct, frozen=True):
    """What the operator of the conversation says: a system or developer message."""

    parts: tuple[Part, ...]


class UserTurn(Struct, frozen=True):
    parts: tuple[Part, ...]


class AssistantTurn(Struct, frozen=True):
    parts: tuple[Part, ...]
    calls: tuple[ToolUse, ...] = ()


class ToolResult(Struct, frozen=True):
    """What a tool gave back; `call_id` and `name` are those of the call."""

    call_id: str
    name: str
    parts: tuple[Part, ...]


Turn = Instruction | UserTurn | AssistantTurn | ToolResult


class ToolSpec(Struct, frozen=True):
    """A tool that the model may call. `parameters` is a JSON schema; None for a tool that takes none."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedChoice(Struct, frozen=True):
    """This tool must be called."""

    name: str


class AnySchema(Struct, frozen=True):
    """The answer must be a JSON object."""


class AnswerSchema(Struct, frozen=True):
    """The answer must validate."""

    name: str
    schema: dict[str, Any]


class ChatRequest(Struct, frozen=True):
    """What is asked. `turns` has one entry a message, in order, so that an error can name the message.

    `others` holds by OpenAI's names what not every dialect knows (`seed`, `logprobs`, …) and fields that none of ours
    does, as JSON; what says nothing (null, a default) is not among them.
    """

    turns: tuple[Turn, ...]
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    tools: tuple[ToolSpec, ...] = ()
    tool_choice: Literal["auto", "none", "required"] | NamedChoice = "auto"
    parallel_tool_calls: bool = True
    answer_format: AnySchema | AnswerSchema | None = None
    others: Mapping[str, Raw] = {}


class StopReason(Enum):
    """Why an answer ended. The value is OpenAI's name for it."""

    END = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    CONTENT_FILTER = "content_filter"


class TextDelta(Struct, frozen=True, gc=False):
    """More of the answer's text; never empty, and neither is any other delta."""

    text: str


class ReasoningDelta(Struct, frozen=True, gc=False):
    """More of what the model thinks before it answers."""

    text: str


class ToolStart(Struct, frozen=True, gc=False):
    """A call begins; its arguments follow. `index` counts the calls of the answer from 0."""

    index: int
    id: str
    name: str


class ToolArguments(Struct, frozen=True, gc=False):
    """More of a call's arguments; put together they are the text of a JSON object."""

    index: int
    json: str


class Tokens(Struct, frozen=True, gc=False):
    """What the server says of its usage so far; `final` once it counts the whole answer.

    `cached` is part of `prompt`, `reasoning` of `completion`. None of it is checked.
    """

    prompt: int
    completion: int
    cached: int = 0
    reasoning: int = 0
    final: bool = True


class End(Struct, frozen=True, gc=False):
    """The model is done; usage may follow."""

    reason: StopReason


class Failed(Struct, frozen=True):
    """The answer breaks off. The last event."""

    error: HelixError


Event = TextDelta | ReasoningDelta | ToolStart | ToolArguments | Tokens | End | Failed


class AnswerReader(Protocol):
    """Reads one streamed answer of a dialect, sans-I/O."""

    done: bool
    """Whether the answer is whole. What comes after that is not read."""

    def feed(self, data: bytes) -> list[Event]:
        """The events that `data` completes. What is not the dialect gives `Failed` (UPSTREAM_INVALID)."""
        ...


def unsupported(param: str, hint: str = "leave it out") -> HelixError:
    """The error for a parameter that the model's server has no word for."""
    return HelixError(ErrorKind.UNSUPPORTED, f"This model does not support '{param}'; {hint}.", param=param)


def refuse_rest(others: Mapping[str, Raw], known: frozenset[str] = frozenset()) -> None:
    """Raises `HelixError` UNSUPPORTED naming the first of `others` that is not `known`."""
    for name in others:
        if name not in known:
            raise unsupported(name[:64])
