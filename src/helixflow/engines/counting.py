"""Tokens of answers whose server does not say how many it used: by its own tokenizer, else by their length."""

import time
from typing import Any, Final

import msgspec
import structlog

from helixflow.core.call import Call
from helixflow.core.errors import HelixError
from helixflow.dialects.openai_chat import ChatParams
from helixflow.dialects.openai_completions import CompletionParams
from helixflow.transport.client import HttpClient, Timeouts, build_head
from helixflow.transport.origin import Origin

# The usual length of a token in English text.
_BYTES_A_TOKEN: Final = 4
_TIMEOUTS: Final = Timeouts(connect_s=2, first_byte_s=5, idle_s=5)
_MAX_ANSWER_BYTES: Final = 16 * 2**20
# A server without a tokenizer is asked again after so long: it may have been replaced.
_ASK_AGAIN_S: Final = 600.0

log = structlog.get_logger("helixflow.engines")


class TokenCounter:
    """Counts for one upstream server by `POST /tokenize`, which vLLM and llama.cpp have beside their API."""

    def __init__(self, client: HttpClient, origin: Origin, headers: list[tuple[str, str]], model: str) -> None:
        """`headers` are those of other requests there, `model` the server's name for it."""
        self._client = client
        self._origin = origin
        self._head = build_head("POST", "/tokenize", origin, headers)
        self._model = model
        self._unavailable_until = 0.0

    async def fill(self, call: Call, answer: str | None) -> None:
        """Counts the prompt, and the answer unless that has been counted as it came (None), into the call's usage,
        which stays not `reported`. Never raises `HelixError`.
        """
        usage = call.progress.usage
        text, ids = prompt_text(call)
        if not usage.prompt_tokens:
            usage.prompt_tokens = ids + await self._count(text, call.deadline)
        if answer is not None:
            counted = await self._count(answer, call.deadline)
            limit = call.params.answer_limit if isinstance(call.params, ChatParams | CompletionParams) else None
            usage.completion_tokens = counted if limit is None else min(counted, limit)

    async def _count(self, text: str, deadline: float) -> int:
        if not text:
            return 0
        if time.monotonic() >= self._unavailable_until:
            try:
                return await self._ask(text, deadline)
            except (HelixError, msgspec.DecodeError, ValueError) as exc:
                self._unavailable_until = time.monotonic() + _ASK_AGAIN_S
                log.info("tokenizer.unavailable", model=self._model, reason=str(exc)[:200])
        return estimate(text)

    async def _ask(self, text: str, deadline: float) -> int:
        """Raises `ValueError` when the server has no tokenizer."""
        # vLLM wants `prompt`, llama.cpp `content`; both ignore what they do not know.
        body = msgspec.json.encode({"model": self._model, "prompt": text, "content": text})
        response = await self._client.request(self._origin, self._head, body, timeouts=_TIMEOUTS, deadline=deadline)
        try:
            if response.status != 200:
                raise ValueError(f"status {response.status}")
            tokens = msgspec.json.decode(await response.read_all(_MAX_ANSWER_BYTES), type=_Tokens).tokens
        finally:
            response.close()
        return len(tokens)


class _Tokens(msgspec.Struct, frozen=True):
    tokens: list[msgspec.Raw]


def estimate(text: str) -> int:
    """How many tokens a text of this length usually has."""
    return -(-len(text.encode()) // _BYTES_A_TOKEN)


def estimate_prompt(call: Call) -> int:
    """The same for all that a request gives to the model."""
    text, ids = prompt_text(call)
    return ids + estimate(text)


def prompt_text(call: Call) -> tuple[str, int]:
    """All text that a request gives to the model, in order, and the number of its token ids."""
    for name in ("messages", "prompt", "input"):
        if name in call.fields:
            given = msgspec.json.decode(call.fields[name])
            return "\n".join(_texts(given)), _count_ids(given)
    return "", 0


def answer_text(body: bytes) -> str:
    """All text that the model has written in a whole answer."""
    try:
        answer = msgspec.json.decode(body, type=_Answer)
    except (msgspec.DecodeError, RecursionError):
        return ""
    return "\n".join(text for choice in answer.choices for text in _texts([choice.message, choice.text]))


class _Choice(msgspec.Struct, frozen=True):
    message: Any = None
    text: str | None = None


class _Answer(msgspec.Struct, frozen=True):
    choices: list[_Choice] = []


# Where models read and write.
_TEXT_FIELDS: Final = ("content", "text", "reasoning_content", "refusal", "name", "arguments", "function", "tool_calls")


def _count_ids(value: Any) -> int:
    if isinstance(value, list):
        return sum(1 if isinstance(entry, int) else _count_ids(entry) for entry in value)
    return 0


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for entry in value for text in _texts(entry)]
    if isinstance(value, dict):
        return [text for name in _TEXT_FIELDS if name in value for text in _texts(value[name])]
    return []
