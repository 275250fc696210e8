"""OpenAI chat completions: the request. https://platform.openai.com/docs/api-reference/chat/create"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.validation import decode_params

Temperature = Annotated[float, Meta(ge=0, le=2)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Choices = Annotated[int, Meta(ge=1, le=128)]
Positive = Annotated[int, Meta(ge=1)]
Stops = Annotated[list[str], Meta(max_length=4)]
ModelName = Annotated[str, Meta(min_length=1, max_length=256)]


class ImageUrl(Struct, frozen=True):
    url: str


class TextPart(Struct, frozen=True, tag_field="type", tag="text"):
    text: str


class RefusalPart(Struct, frozen=True, tag_field="type", tag="refusal"):
    refusal: str


class ImagePart(Struct, frozen=True, tag_field="type", tag="image_url"):
    image_url: ImageUrl


class AudioPart(Struct, frozen=True, tag_field="type", tag="input_audio"):
    input_audio: dict[str, Any]


class FilePart(Struct, frozen=True, tag_field="type", tag="file"):
    file: dict[str, Any]


Part = TextPart | RefusalPart | ImagePart | AudioPart | FilePart
Content = str | list[Part]


class CalledFunction(Struct, frozen=True):
    name: str
    arguments: str


class ToolCall(Struct, frozen=True):
    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class SystemMessage(Struct, frozen=True, tag_field="role", tag="system"):
    content: Content
    name: str | None = None


class DeveloperMessage(Struct, frozen=True, tag_field="role", tag="developer"):
    content: Content
    name: str | None = None


class UserMessage(Struct, frozen=True, tag_field="role", tag="user"):
    content: Content
    name: str | None = None


class AssistantMessage(Struct, frozen=True, tag_field="role", tag="assistant"):
    content: Content | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: CalledFunction | None = None


class ToolMessage(Struct, frozen=True, tag_field="role", tag="tool"):
    content: Content
    tool_call_id: str


class FunctionMessage(Struct, frozen=True, tag_field="role", tag="function"):
    name: str
    content: str | None


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage | FunctionMessage


class StreamOptions(Struct, frozen=True):
    include_usage: bool | None = None


class JsonSchema(Struct, frozen=True):
    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None
    description: str | None = None


class TextFormat(Struct, frozen=True, tag_field="type", tag="text"):
    pass


class JsonObjectFormat(Struct, frozen=True, tag_field="type", tag="json_object"):
    pass


class JsonSchemaFormat(Struct, frozen=True, tag_field="type", tag="json_schema"):
    json_schema: JsonSchema


class FunctionDefinition(Struct, frozen=True):
    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct, frozen=True):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Struct, frozen=True):
    name: str


class NamedTool(Struct, frozen=True):
    type: Literal["function"]
    function: NamedFunction


# The API reference's bounds; the pairs become tags of the request in the ledger.
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]


class ChatParams(Struct, frozen=True):
    """What we check and act upon; other fields pass on as they came."""

    model: ModelName
    messages: Annotated[list[Message], Meta(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Choices | None = None
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    seed: int | None = None
    stop: str | Stops | None = None
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    user: str | None = None
    metadata: Metadata | None = None

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def token_limit(self) -> int | None:
        """The most tokens to generate, whichever name it was given by."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def answer_limit(self) -> int | None:
        """The most tokens of all answers together; None: as many as the context holds."""
        limit = self.token_limit
        return None if limit is None else limit * self.choices

    @property
    def media(self) -> "Media":
        """Images, sounds and files, wherever they are."""
        parts = inlined = 0
        for message in self.messages:
            if type(message.content) is list:
                for part in message.content:
                    size = _inlined_bytes(part)
                    if size is not None:
                        parts += 1
                        inlined += size
        return Media(parts, inlined)


class Media(Struct, frozen=True):
    """How many parts are no text, and how many bytes of the request their content takes."""

    parts: int
    inlined_bytes: int


def _inlined_bytes(part: Part) -> int | None:
    """None for text."""
    if isinstance(part, ImagePart):
        return len(part.image_url.url)
    if isinstance(part, AudioPart):
        return sum(len(value) for value in part.input_audio.values() if isinstance(value, str))
    if isinstance(part, FilePart):
        return sum(len(value) for value in part.file.values() if isinstance(value, str))
    return None


_DECODER = msgspec.json.Decoder(ChatParams)
_ELEMENTS: dict[str, msgspec.json.Decoder[Any]] = {
    "messages": msgspec.json.Decoder(Message),
    "content": msgspec.json.Decoder(Part),
    "tool_calls": msgspec.json.Decoder(ToolCall),
    "tools": msgspec.json.Decoder(Tool),
    "stop": msgspec.json.Decoder(str),
}


def parse_chat(body: bytes) -> ChatParams:
    """The validated request. Raises `HelixError` with `param` naming the field."""
    params = decode_params(body, _DECODER, _ELEMENTS)
    if params.stream_options is not None and not params.stream:
        raise _invalid("stream_options", "'stream_options' is only allowed when 'stream' is true")
    limit, completion_limit = params.max_tokens, params.max_completion_tokens
    if limit is not None and completion_limit is not None and limit != completion_limit:
        raise _invalid(
            "max_tokens", "'max_tokens' and 'max_completion_tokens' mean the same and differ; give only one of them"
        )
    if params.top_logprobs is not None and not params.logprobs:
        raise _invalid("top_logprobs", "'top_logprobs' is only allowed when 'logprobs' is true")
    if params.logit_bias:
        check_logit_bias(params.logit_bias)
    if params.tool_choice is not None or params.tools is not None:
        _check_tools(params)
    _check_messages(params.messages)
    return params


def check_logit_bias(bias: dict[str, float]) -> None:
    """Keys must be token ids: whole numbers from 0."""
    for key in bias:
        if not (key.isascii() and key.isdigit()):
            raise _invalid("logit_bias", f"the keys of 'logit_bias' must be token ids, not {key[:40]!r}")


def _check_tools(params: ChatParams) -> None:
    choice = params.tool_choice
    if not params.tools:
        if choice is not None and choice != "none":
            raise _invalid("tool_choice", "'tool_choice' is only allowed when 'tools' are given")
        return
    if isinstance(choice, NamedTool) and all(t.function.name != choice.function.name for t in params.tools):
        raise _invalid("tool_choice", f"'tool_choice' names {choice.function.name[:64]!r}, which is not among 'tools'")


def _check_messages(messages: list[Message]) -> None:
    known_calls: set[str] = set()
    for index, message in enumerate(messages):
        kind = type(message)
        if kind is UserMessage or kind is SystemMessage:
            continue
        if isinstance(message, AssistantMessage):
            if message.tool_calls:
                known_calls.update(call.id for call in message.tool_calls)
            elif message.content is None and message.refusal is None and message.function_call is None:
                raise _invalid(
                    f"messages[{index}].content", "an assistant message needs 'content' unless it has 'tool_calls'"
                )
        elif isinstance(message, ToolMessage) and message.tool_call_id not in known_calls:
            raise _invalid(
                f"messages[{index}].tool_call_id",
                "a message with role 'tool' must follow an assistant message whose 'tool_calls' has the same id",
            )


def _invalid(param: str, message: str) -> HelixError:
    return HelixError(ErrorKind.INVALID_VALUE, f"Invalid request: {message}.", param=param)
