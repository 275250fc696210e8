"""Typed views of OpenAI-shaped answers and stream events, for reading them."""

from typing import Any, Final

import msgspec
from msgspec import Raw, Struct

from helixflow.core.call import Usage

# No request has more: a server that says so is wrong, and is not believed.
MAX_TOKENS: Final = 10**9


class PromptDetails(Struct, frozen=True):
    cached_tokens: int | None = None


class CompletionDetails(Struct, frozen=True):
    reasoning_tokens: int | None = None


class UsageBody(Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None
    completion_tokens_details: CompletionDetails | None = None

    @classmethod
    def of(cls, prompt: int, completion: int, cached: int, reasoning: int) -> "UsageBody":
        """The same from servers that name it otherwise."""
        return cls(prompt, completion, PromptDetails(cached), CompletionDetails(reasoning))

    @property
    def is_plausible(self) -> bool:
        return 0 <= self.prompt_tokens <= MAX_TOKENS and 0 <= self.completion_tokens <= MAX_TOKENS

    @property
    def cached_tokens(self) -> int:
        """Part of the prompt."""
        details = self.prompt_tokens_details
        cached = details.cached_tokens or 0 if details is not None else 0
        return min(max(cached, 0), self.prompt_tokens)

    @property
    def reasoning_tokens(self) -> int:
        """Part of the completion."""
        details = self.completion_tokens_details
        reasoning = details.reasoning_tokens or 0 if details is not None else 0
        return min(max(reasoning, 0), self.completion_tokens)

    def copy_to(self, usage: Usage) -> None:
        """What is not plausible is not taken, nor what has no prompt or takes back what came: our own count stands."""
        prompt, completion = self.prompt_tokens, self.completion_tokens
        if not (0 < prompt <= MAX_TOKENS and 0 <= completion <= MAX_TOKENS):
            return
        usage.prompt_tokens = prompt
        usage.cached_tokens = 0 if self.prompt_tokens_details is None else self.cached_tokens
        if completion or not usage.completion_tokens:
            usage.completion_tokens = completion
            usage.reasoning_tokens = 0 if self.completion_tokens_details is None else self.reasoning_tokens
            usage.reported = True


class Delta(Struct, frozen=True):
    """What one chunk adds to a choice; `text` is the completions dialect's, kept on the choice itself."""

    content: Any = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Any = None
    function_call: Any = None
    audio: Any = None

    @property
    def has_content(self) -> bool:
        """Whether something that the model produced is in it; a role alone is not."""
        texts = self.content or self.refusal or self.reasoning_content or self.reasoning
        return bool(texts or self.tool_calls or self.function_call or self.audio)


class StreamChoice(Struct, frozen=True):
    index: int = 0
    delta: Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class StreamEvent(Struct, frozen=True):
    """One event of a chat or completions stream."""

    choices: list[StreamChoice] = []
    usage: UsageBody | None = None
    error: Any = None

    @property
    def has_content(self) -> bool:
        return any(c.text or c.finish_reason or (c.delta is not None and c.delta.has_content) for c in self.choices)

    @property
    def has_output(self) -> bool:
        """Whether the model produced something; the end of a choice alone is not."""
        return any(c.text or (c.delta is not None and c.delta.has_content) for c in self.choices)


STREAM_EVENT = msgspec.json.Decoder(StreamEvent)
FIELDS = msgspec.json.Decoder(dict[str, Raw])
USAGE = msgspec.json.Decoder(UsageBody)
