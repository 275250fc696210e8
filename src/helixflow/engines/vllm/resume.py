"""A stream of plain text that outlives its replica: where one is lost, another one goes on from the same tokens.

The next replica is given the ids of the prompt and of what was made, through `/v1/completions`, and its events are
turned into those of the first. Tokens of a character that was not complete are made again: nobody has seen them, and
given a prompt that ends so vLLM repeats all of its text (seen with 0.32).

Not plain, and so not resumed: tools, schemas, log-probabilities and media; stop strings, for which vLLM holds back
text; penalties that count only what was generated.
"""

import sys
from collections.abc import Mapping
from typing import Any, Final

import msgspec
import structlog
from msgspec import Raw, Struct

from helixflow.core.call import Call, Operation
from helixflow.core.capacity import Slots
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.openai_answers import end_of_stream
from helixflow.dialects.openai_chat import ChatParams, TextFormat
from helixflow.dialects.openai_completions import DEFAULT_MAX_TOKENS, CompletionParams
from helixflow.dialects.openai_events import UsageBody
from helixflow.engines.replica_faults import is_replica_fault
from helixflow.engines.vllm.generation import Generation, post
from helixflow.transport.client import HttpClient
from helixflow.transport.sse import data_of

# A request that kills whatever serves it must not go round all replicas for ever.
MOST_RESUMES: Final = 8
# Fields of the first request that are not for the next one: it has ids for messages.
_CHAT_ONLY: Final = frozenset(
    {
        *("messages", "tools", "tool_choice", "parallel_tool_calls", "response_format", "chat_template_kwargs"),
        *("add_generation_prompt", "continue_final_message", "add_special_tokens", "documents", "reasoning_effort"),
        *("include_reasoning", "logprobs", "top_logprobs", "max_completion_tokens", "n", "echo", "metadata", "store"),
    }
)
# What constrains or counts over the whole answer.
_SPANNING: Final = frozenset(
    {
        *("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "bad_words"),
        *("logits_processors", "thinking_token_budget", "include_reasoning", "use_beam_search", "prompt_logprobs"),
        *("truncate_prompt_tokens", "repetition_detection"),
    }
)

log = structlog.get_logger("helixflow.engines")


class _Choice(Struct, frozen=True):
    text: str = ""
    finish_reason: str | None = None


class _Event(Struct, frozen=True):
    choices: list[_Choice] = []
    usage: UsageBody | None = None


class _Frame(Struct, frozen=True):
    """What all events of an answer have in common."""

    id: Raw
    object: Raw
    created: Raw
    model: Raw


_EVENT: Final = msgspec.json.Decoder(_Event)
_FRAME: Final = msgspec.json.Decoder(_Frame)


def is_plain(call: Call) -> bool:
    """Whether what the model writes is what the client gets, token by token, from any point on."""
    params = call.params
    if isinstance(params, ChatParams):
        simple = (
            not params.tools
            and not params.logprobs
            and (params.response_format is None or isinstance(params.response_format, TextFormat))
            and not params.media.parts
        )
    elif isinstance(params, CompletionParams):
        simple = params.logprobs is None and (params.best_of or 1) == 1 and not params.echo and len(params.prompts) == 1
    else:
        return False
    return (
        simple
        and params.choices == 1
        and not (params.stop or params.presence_penalty or params.frequency_penalty)
        and not call.fields.keys() & _SPANNING
    )


class ResumingGeneration:
    """Reads like one generation. What was read from `generation` before is told by `note`."""

    def __init__(
        self,
        client: HttpClient,
        slots: Slots,
        deployment: str,
        fields: Mapping[str, Raw],
        call: Call,
        generation: Generation,
    ) -> None:
        self._client = client
        self._slots = slots
        self._deployment = deployment
        self._fields = fields
        self._call = call
        self._generation = generation
        self._is_chat = call.operation is Operation.CHAT
        # The most tokens of the answer.
        self._limit = 0
        self._frame: _Frame | None = None
        self._prompt: list[int] = []
        # Of the replicas before the present one.
        self._made: list[int] = []
        self._lost: set[str] = set()
        self._attempts = 0
        self._ended = False

    def note(self, data: bytes) -> None:
        """The first events, which the later ones must resemble."""
        if self._frame is None:
            first, _, _ = data.partition(b"\n\n")
            self._frame = _FRAME.decode(data_of(first + b"\n\n") or b"")

    async def read(self) -> bytes:
        """As `Generation.read`; raises UPSTREAM_UNAVAILABLE when the replica is lost and no other one can go on."""
        while not self._ended:
            try:
                data = await self._generation.read()
            except HelixError as exc:
                if not self._generation.broken_off:
                    raise
                data = await self._go_on(exc)
            else:
                if not self._prompt:
                    return data
                data = self._translate(data)
            if data:
                return data
        return b""

    async def finish(self) -> None:
        """As `Generation.finish`."""
        await self._generation.finish()

    def close(self) -> None:
        """Ends the generation if it still runs and gives the slot back. Idempotent."""
        self._generation.close()

    async def _go_on(self, lost: HelixError) -> bytes:
        """Goes on from another replica; returns the last events where nothing is left to make.

        Raises `lost` when none can, and DEADLINE when none could in time.
        """
        events, call = self._generation.events, self._call
        self._generation.close()
        prompt = self._prompt or events.prompt
        if not prompt or self._frame is None:
            raise lost
        if events.counted:
            self._ended = True
            return end_of_stream(call.progress.resumed)
        if not self._prompt:
            self._prompt = prompt
            self._limit = min(_limit_of(call), self._generation.context - len(prompt))
        self._made += events.ids
        if events.finished:
            return self._end()
        if len(self._made) >= self._limit:
            return self._chunk("", "length") + self._end()
        dead = self._generation.replica_id
        self._lost.add(dead)
        while self._attempts < MOST_RESUMES:
            self._attempts += 1
            try:
                await self._resume()
            except HelixError as exc:
                if exc.kind is ErrorKind.DEADLINE:
                    raise
                if not is_replica_fault(exc):
                    raise lost from exc
                continue
            call.progress.resumed += 1
            log.info(
                "stream.resumed",
                deployment=self._deployment,
                call_id=call.call_id,
                lost=dead,
                replica=self._generation.replica_id,
                tokens=len(self._made),
            )
            return b""
        raise lost

    async def _resume(self) -> None:
        """One attempt. Raises `HelixError` as `Slots.acquire` and `post` do."""
        slots, call = self._slots, self._call
        # Without another one, what was lost may come back, or was not lost at all.
        lease = await slots.acquire(call, avoid=self._lost if slots.has_alternative() else ())
        try:
            body = msgspec.json.encode(self._remainder())
            response = await post(self._client, lease.replica, "/v1/completions", body, call)
        except BaseException as exc:
            self._lost.add(lease.replica.replica_id)
            lease.release(failed=is_replica_fault(exc))
            raise
        self._generation = Generation(response, lease, call)

    def _remainder(self) -> dict[str, Raw]:
        """The request for what is missing."""
        made = len(self._made)
        fields = {name: value for name, value in self._fields.items() if name not in _CHAT_ONLY}
        fields["prompt"] = Raw(msgspec.json.encode(self._prompt + self._made))
        fields["max_tokens"] = Raw(b"%d" % (self._limit - made))
        if "min_tokens" in fields:
            least = msgspec.json.decode(fields["min_tokens"], type=int)
            fields["min_tokens"] = Raw(b"%d" % max(0, least - made))
        if "seed" in fields and (seed := msgspec.json.decode(fields["seed"], type=int | None)) is not None:
            # The sampler starts anew: with the same seed it would draw the numbers of the beginning again.
            fields["seed"] = Raw(b"%d" % ((seed + made) & 0x7FFFFFFF))
        return fields

    def _translate(self, data: bytes) -> bytes:
        """Events of a later replica as those of the first one."""
        out = []
        for event in data.split(b"\n\n"):
            payload = data_of(event + b"\n\n") if event else None
            if payload is None or payload == b"[DONE]":
                continue
            decoded = _EVENT.decode(payload)
            out += [
                self._chunk(choice.text, choice.finish_reason)
                for choice in decoded.choices
                if choice.text or choice.finish_reason is not None
            ]
            if decoded.usage is not None:
                self._made += self._generation.events.ids
                out.append(self._end())
        return b"".join(out)

    def _chunk(self, text: str, reason: str | None) -> bytes:
        shown: dict[str, Any] = {"delta": {"content": text} if text else {}} if self._is_chat else {"text": text}
        return self._event([{"index": 0, **shown, "logprobs": None, "finish_reason": reason}])

    def _end(self) -> bytes:
        """The last events: the usage of all replicas as that of one."""
        self._ended = True
        prompt, made = len(self._prompt), len(self._made)
        usage = {"prompt_tokens": prompt, "total_tokens": prompt + made, "completion_tokens": made}
        return self._event([], usage=usage) + end_of_stream(self._call.progress.resumed)

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        frame = self._frame
        assert frame is not None
        common = {"id": frame.id, "object": frame.object, "created": frame.created, "model": frame.model}
        return b"data: " + msgspec.json.encode({**common, "choices": choices, **more}) + b"\n\n"


def _limit_of(call: Call) -> int:
    """The most tokens of the answer as the request says; one that does not may have as many as the context holds."""
    params = call.params
    if isinstance(params, CompletionParams):
        return DEFAULT_MAX_TOKENS if params.max_tokens is None else params.max_tokens
    assert isinstance(params, ChatParams)
    return params.token_limit or sys.maxsize
