"""Answers of servers that speak another dialect: read as neutral events, written as OpenAI's.

Every one is streamed by its server, so that a client that leaves ends it, and put together here where the client wants
it whole. `call.progress` is kept right on the way.
"""

import time
from typing import Any, Final, Protocol

from helixflow.core.call import Call, Stream, Usage
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.neutral import (
    AnswerReader,
    End,
    Event,
    Failed,
    ReasoningDelta,
    StopReason,
    TextDelta,
    Tokens,
    ToolArguments,
    ToolStart,
)
from helixflow.dialects.openai_answers import ChatWriter, CompletionWriter
from helixflow.dialects.openai_events import UsageBody
from helixflow.dialects.openai_neutral import ChatChunks, ChatMessage, CompletionChunks, CompletionText
from helixflow.dialects.provider_errors import content_filtered
from helixflow.engines.answers import WholeAnswer
from helixflow.engines.counting import estimate_prompt
from helixflow.engines.provider import MAX_ANSWER_BYTES, Provider, settle
from helixflow.transport.client import HttpResponse

# The usual length of a token in English text: for what is counted before the server reports it.
_CHARACTERS_A_TOKEN: Final = 4
_CONTENT: Final = (TextDelta, ReasoningDelta, ToolStart, End)


class _Chunks(Protocol):
    def write(self, event: Event) -> bytes: ...

    def end(self, usage: Usage | None) -> bytes: ...


class _Whole(Protocol):
    def add(self, event: Event) -> None: ...

    def choice(self) -> dict[str, Any]: ...


async def open_chat(provider: Provider, response: HttpResponse, reader: AnswerReader, call: Call) -> Stream:
    """The answer of a chat; returns when its first content is at hand (streams) or all of it is (otherwise).

    Owns `response` from now on. Raises `HelixError` as the answer breaks off or is no answer.
    """
    writer = ChatWriter(
        f"chatcmpl-{call.call_id}", int(time.time()), call.public_model, "", include_usage=call.include_usage
    )
    return await _open(provider, response, reader, call, writer, ChatChunks(writer), ChatMessage())


async def open_completion(provider: Provider, response: HttpResponse, reader: AnswerReader, call: Call) -> Stream:
    """The same for a completion."""
    writer = CompletionWriter(
        f"cmpl-{call.call_id}", int(time.time()), call.public_model, "", include_usage=call.include_usage
    )
    return await _open(provider, response, reader, call, writer, CompletionChunks(writer), CompletionText())


async def _open(
    provider: Provider,
    response: HttpResponse,
    reader: AnswerReader,
    call: Call,
    writer: ChatWriter | CompletionWriter,
    chunks: _Chunks,
    whole: _Whole,
) -> Stream:
    answer = _Answer(response, reader, call)
    try:
        events = await answer.begin()
        if call.stream:
            return _ConvertedStream(provider, answer, chunks, events, call)
        while events:
            for event in events:
                whole.add(event)
            if answer.received > MAX_ANSWER_BYTES:
                raise HelixError(ErrorKind.UPSTREAM_INVALID, "The model's server sent an answer that is too large.")
            events = await answer.read()
        await answer.settle()
    except BaseException:
        answer.close()
        raise
    return WholeAnswer(writer.answer([whole.choice()], call.progress.usage))


class _Answer:
    """The events of one answer."""

    def __init__(self, response: HttpResponse, reader: AnswerReader, call: Call) -> None:
        self._response = response
        self._reader = reader
        self._call = call
        self._failure: HelixError | None = None
        self._ended = False
        self.received = 0

    async def begin(self) -> list[Event]:
        """The events with the first content among them; those before it have no chunks.

        Raises `HelixError` CONTENT_FILTERED where nothing comes but that: another model may answer.
        """
        while events := await self.read():
            first = next((event for event in events if isinstance(event, _CONTENT)), None)
            if first is not None:
                if isinstance(first, End) and first.reason is StopReason.CONTENT_FILTER:
                    raise content_filtered()
                self._call.progress.first_content_at = time.perf_counter()
                return events
        raise HelixError(ErrorKind.UPSTREAM_INVALID, "The model's server ended the stream before its first word.")

    async def read(self) -> list[Event]:
        """The next events; none at the end. Raises `HelixError` once those before a failure have been read."""
        while self._failure is None:
            if self._reader.done:
                if not self._ended:
                    raise HelixError(
                        ErrorKind.UPSTREAM_INVALID, "The model's server ended its answer without a reason."
                    )
                progress = self._call.progress
                if not progress.usage.prompt_tokens:
                    progress.usage.prompt_tokens = estimate_prompt(self._call)
                progress.complete = True
                return []
            data = await self._response.read()
            if not data:
                raise HelixError(
                    ErrorKind.UPSTREAM_INVALID, "The model's server broke off in the middle of its answer."
                )
            self.received += len(data)
            events = self._reader.feed(data)
            if events and isinstance(last := events[-1], Failed):
                self._failure = last.error
                del events[-1]
            for event in events:
                self._note(event)
            if events:
                return events
        raise self._failure

    async def settle(self) -> None:
        """After the end: lets the connection be kept."""
        await settle(self._response)

    def close(self) -> None:
        self._response.close()

    def _note(self, event: Event) -> None:
        progress = self._call.progress
        usage = progress.usage
        match event:
            case TextDelta(text=text) | ReasoningDelta(text=text) | ToolArguments(json=text):
                if not usage.reported:
                    usage.completion_tokens += max(1, len(text) // _CHARACTERS_A_TOKEN)
            case Tokens():
                self._note_tokens(event)
            case End(reason=reason):
                self._ended = True
                progress.finish_reason = reason.value

    def _note_tokens(self, tokens: Tokens) -> None:
        body = UsageBody.of(tokens.prompt, tokens.completion, tokens.cached, tokens.reasoning)
        usage = self._call.progress.usage
        if tokens.final:
            body.copy_to(usage)
        elif body.is_plausible:
            # Known from the start, so that an answer that breaks off is not recorded without its prompt.
            usage.prompt_tokens, usage.cached_tokens = body.prompt_tokens, body.cached_tokens


class _ConvertedStream:
    """Implements `Stream`."""

    def __init__(self, provider: Provider, answer: _Answer, chunks: _Chunks, first: list[Event], call: Call) -> None:
        self._provider = provider
        self._answer = answer
        self._chunks = chunks
        self._first = first
        self._call = call
        self._ended = False

    async def read(self) -> bytes:
        if self._ended:
            await self._answer.settle()
            return b""
        while True:
            events, self._first = self._first, []
            if not events:
                try:
                    events = await self._answer.read()
                except HelixError as exc:
                    self._provider.report(exc)
                    raise
            if not events:
                self._ended = True
                return self._chunks.end(self._call.progress.usage if self._call.include_usage else None)
            if out := b"".join([self._chunks.write(event) for event in events]):
                return out

    def close(self) -> None:
        self._answer.close()
