"""OpenAI (legacy) completions: the request. https://platform.openai.com/docs/api-reference/completions/create"""

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.openai_chat import (
    Bias,
    Choices,
    ModelName,
    Penalty,
    Probability,
    Stops,
    StreamOptions,
    Temperature,
    check_logit_bias,
)
from helixflow.dialects.validation import decode_params

DEFAULT_MAX_TOKENS = 16  # the API reference's default

TokenId = Annotated[int, Meta(ge=0)]
Prompt = str | list[TokenId]


class CompletionParams(Struct, frozen=True):
    """What we check and act upon; other fields pass on as they came. `prompt` is resolved by `prompts`."""

    model: ModelName
    prompt: str | list[str | TokenId | list[TokenId]]
    suffix: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Choices | None = None
    best_of: Annotated[int, Meta(ge=1, le=20)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    max_tokens: Annotated[int, Meta(ge=0)] | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | None = None
    seed: int | None = None
    stop: str | Stops | None = None
    user: str | None = None

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def answer_limit(self) -> int:
        """The most tokens of all answers together, those that are thrown away too."""
        limit = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        return limit * max(self.best_of or 1, self.n or 1) * len(self.prompts)

    @property
    def prompts(self) -> list[Prompt]:
        """One entry a prompt: a string, array of strings, token ids and arrays of token ids all come out the same."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [entry for entry in self.prompt if not isinstance(entry, int)]


_DECODER = msgspec.json.Decoder(CompletionParams)
_ELEMENTS: dict[str, msgspec.json.Decoder[Any]] = {
    "prompt": msgspec.json.Decoder(str | TokenId | list[TokenId]),
    "stop": msgspec.json.Decoder(str),
}
MAX_PROMPTS = 2048


def parse_completion(body: bytes) -> CompletionParams:
    """The validated request. Raises `HelixError` with `param` naming the field."""
    params = decode_params(body, _DECODER, _ELEMENTS)
    if isinstance(params.prompt, list):
        if not params.prompt:
            raise _invalid("prompt", "'prompt' must not be an empty array")
        if len({type(entry) for entry in params.prompt}) > 1:
            raise _invalid("prompt", "'prompt' must not mix strings, token ids and arrays")
        if len(params.prompts) > MAX_PROMPTS:
            raise _invalid("prompt", f"'prompt' has {len(params.prompts)} entries; at most {MAX_PROMPTS} are allowed")
    if params.stream_options is not None and not params.stream:
        raise _invalid("stream_options", "'stream_options' is only allowed when 'stream' is true")
    if params.best_of is not None:
        if params.best_of < params.choices:
            raise _invalid("best_of", "'best_of' must not be smaller than 'n'")
        if params.stream and params.best_of > 1:
            raise _invalid("best_of", "'best_of' cannot be streamed")
    generations = len(params.prompts) * max(params.best_of or 1, params.choices)
    if generations > MAX_PROMPTS:
        raise _invalid("n", f"prompts times choices are {generations}; at most {MAX_PROMPTS} are allowed")
    if params.max_tokens == 0 and not params.echo:
        raise _invalid("max_tokens", "'max_tokens' may be 0 only together with 'echo'")
    if params.logit_bias:
        check_logit_bias(params.logit_bias)
    return params


def _invalid(param: str, message: str) -> HelixError:
    return HelixError(ErrorKind.INVALID_VALUE, f"Invalid request: {message}.", param=param)
