"""Writes OpenAI-shaped answers and stream events for engines of our own."""

from typing import Any

import msgspec

from helixflow.core.call import Usage

DONE = b"data: [DONE]\n\n"
_END = b"\n\n"


def end_of_stream(resumed: int) -> bytes:
    """The last event, after a comment that says how often the stream went on from another replica, if it did."""
    return b": helixflow-resumed %d\n\n%b" % (resumed, DONE) if resumed else DONE


def usage_body(usage: Usage) -> dict[str, Any]:
    """The `usage` object of an answer."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


class ChatWriter:
    """The chat dialect: one instance an answer, so that id, time and model are the same in all its chunks."""

    def __init__(self, answer_id: str, created: int, model: str, fingerprint: str, *, include_usage: bool) -> None:
        self._common: dict[str, Any] = {
            "id": answer_id,
            "object": "chat.completion",
            "created": created,
            "model": model,
            "system_fingerprint": fingerprint,
        }
        head = msgspec.json.encode({**self._common, "object": "chat.completion.chunk"})
        self._head = b"data: " + head[:-1]
        self._tail = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._after_delta = b',"logprobs":null,"finish_reason":null}]' + self._tail
        self._before_delta: dict[int, bytes] = {}

    def delta(self, index: int, delta: bytes) -> bytes:
        """A chunk whose delta is given as JSON, without log-probabilities: the common case, joined from bytes."""
        before = self._before_delta.get(index)
        if before is None:
            before = self._before_delta[index] = self._head + b',"choices":[{"index":%d,"delta":' % index
        return before + delta + self._after_delta

    def role(self, index: int) -> bytes:
        """The first chunk of a choice."""
        return self.delta(index, b'{"role":"assistant","content":"","refusal":null}')

    def chunk(self, index: int, delta: Any, logprobs: Any, finish_reason: str | None) -> bytes:
        """Any other chunk."""
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._head + b',"choices":' + msgspec.json.encode([choice]) + self._tail

    def usage(self, usage: Usage) -> bytes:
        """The chunk with no choices and the numbers."""
        return self._head + b',"choices":[],"usage":' + msgspec.json.encode(usage_body(usage)) + b"}\n\n"

    def answer(self, choices: list[dict[str, Any]], usage: Usage) -> bytes:
        """The whole answer, for calls that are not streamed."""
        return msgspec.json.encode({**self._common, "choices": choices, "usage": usage_body(usage)})


class CompletionWriter:
    """The completions dialect, likewise."""

    def __init__(self, answer_id: str, created: int, model: str, fingerprint: str, *, include_usage: bool) -> None:
        self._common: dict[str, Any] = {
            "id": answer_id,
            "object": "text_completion",
            "created": created,
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._head = b"data: " + msgspec.json.encode(self._common)[:-1]
        self._tail = b',"usage":null}' if include_usage else b"}"

    def chunk(self, index: int, text: str, logprobs: Any, finish_reason: str | None) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._head + b',"choices":' + msgspec.json.encode([choice]) + self._tail + _END

    def usage(self, usage: Usage) -> bytes:
        return self._head + b',"choices":[],"usage":' + msgspec.json.encode(usage_body(usage)) + b"}" + _END

    def answer(self, choices: list[dict[str, Any]], usage: Usage) -> bytes:
        return msgspec.json.encode({**self._common, "choices": choices, "usage": usage_body(usage)})
