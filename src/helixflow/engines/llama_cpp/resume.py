"""A generation of plain text that outlives its replica: where one is lost, another one goes on from the same tokens.

The next replica is given the ids of the prompt and of what was made, through `/v1/completions`, and its events are
turned into those of the first. Penalties are computed from the same ids as before; a seed is not: its sampler starts
anew. A plain answer is one without tools, schema, log-probabilities or media.
"""

import time
from collections.abc import Mapping
from typing import Any, Final, TypeVar

import msgspec
import structlog
from msgspec import Raw, Struct

from helixflow.core.call import Call
from helixflow.core.capacity import Replica, Slots
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.openai_chat import ChatParams, TextFormat
from helixflow.dialects.openai_completions import CompletionParams
from helixflow.engines.llama_cpp.generation import (
    EVENT,
    Generation,
    refusal,
    request,
    start_generation,
)
from helixflow.engines.llama_cpp.token_ids import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    ChatTokens,
    CompletionTokens,
    TokenReader,
    chat_event,
    completion_event,
)
from helixflow.engines.replica_faults import is_replica_fault
from helixflow.engines.resuming import CatchUp, Token, TokenLog
from helixflow.transport.client import HttpClient

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
# A request that kills whatever serves it must not go round all replicas for ever.
MOST_RESUMES: Final = 8
_MOST_GAPS: Final = 64
_MAX_ANSWER_BYTES: Final = 64 * 2**20
# Fields of the first request that are not for the next one: it has ids for messages, and names their tokens otherwise.
_CHAT_ONLY: Final = (
    *("messages", "tools", "tool_choice", "parallel_tool_calls", "response_format", "chat_template_kwargs"),
    *("reasoning_format", "reasoning_effort", *CHAT_FIELDS),
)
# Of llama.cpp's own.
_CONSTRAINTS: Final = frozenset({"grammar", "json_schema", "functions"})
_BROKEN_OFF: Final = "The model's engine stopped in the middle of the answer."

log = structlog.get_logger("helixflow.engines")
_Answer = TypeVar("_Answer")


class _Prompt(Struct, frozen=True):
    prompt: str


class _Ids(Struct, frozen=True):
    tokens: list[int]


class _TokenPiece(Struct, frozen=True):
    id: int
    piece: str | list[int]


class _Pieces(Struct, frozen=True):
    tokens: list[_TokenPiece]


def is_plain_chat(call: Call, params: ChatParams) -> bool:
    """Whether what the model writes is what the client gets, token by token."""
    return (
        not params.tools
        and not params.logprobs
        and (params.response_format is None or isinstance(params.response_format, TextFormat))
        and not params.media.parts
        and not call.fields.keys() & _CONSTRAINTS
    )


def is_plain_completion(call: Call, params: CompletionParams) -> bool:
    """The same for completions; ranking (`best_of`) needs log-probabilities."""
    return (
        params.logprobs is None
        and max(params.best_of or 1, params.choices) == params.choices
        and not call.fields.keys() & _CONSTRAINTS
    )


async def start_resuming(
    client: HttpClient,
    slots: Slots,
    deployment: str,
    path: str,
    payload: Mapping[str, Raw],
    *,
    token_limit: int | None,
    call: Call,
) -> "ResumingGeneration":
    """`start_generation` for a plain answer; `path` is `CHAT` or `COMPLETIONS`."""
    naming = {**payload, **(CHAT_FIELDS if path == CHAT else COMPLETION_FIELDS)}
    generation = await start_generation(client, slots, path, naming, token_limit=token_limit, call=call)
    return ResumingGeneration(client, slots, deployment, path, payload, token_limit, call, generation)


class ResumingGeneration:
    """Reads like one generation, with events of `path`."""

    def __init__(
        self,
        client: HttpClient,
        slots: Slots,
        deployment: str,
        path: str,
        payload: Mapping[str, Raw],
        token_limit: int | None,
        call: Call,
        generation: Generation,
    ) -> None:
        self.fingerprint = generation.fingerprint
        self.prompt_tokens = generation.prompt_tokens
        self._cached_tokens = generation.cached_tokens
        self._client = client
        self._slots = slots
        self._deployment = deployment
        self._is_chat = path == CHAT
        self._event = chat_event if self._is_chat else completion_event
        self._payload = payload
        self._token_limit = token_limit
        self._call = call
        self._generation = generation
        self._log = TokenLog()
        self._tokens: TokenReader = ChatTokens(self._log) if self._is_chat else CompletionTokens(self._log)
        self._catch_up = CatchUp()
        self._prompt: list[int] | None = None
        self._lost: set[str] = set()
        self._attempts = 0
        self._leased_at = 0.0
        self._resumed = False
        self._ended = False

    async def read(self) -> list[bytes]:
        """The next events, an empty list at the end.

        Raises `HelixError` UPSTREAM_UNAVAILABLE when the replica is lost and no other one can go on.
        """
        while not self._ended:
            try:
                events = await self._generation.read()
            except HelixError as exc:
                if not self._generation.broken_off:
                    raise
                if (ending := await self._go_on(exc)) is not None:
                    self._ended = True
                    return ending
                continue
            if not events:
                self._ended = True
            elif self._resumed:
                events = self._translate(events)
                if not events:
                    continue
            else:
                read, event_of = self._tokens.read, self._event
                events = [event if (text := read(event)) is None else event_of(text) for event in events]
            return events
        return []

    def close(self) -> None:
        """Ends the generation if it still runs and gives the slot back. Idempotent."""
        self._generation.close()

    def _translate(self, events: list[bytes]) -> list[bytes]:
        """Events of a later replica as those of the first one, without what was passed on before."""
        out = []
        for event in events:
            text = self._tokens.read(event)
            if text is not None:
                if self._catch_up.left:
                    text = self._only_new(text)
                if text:
                    out.append(self._event(text))
            elif self._tokens.finished:
                decoded = EVENT.decode(event)
                if decoded.usage is not None and decoded.choices:
                    made = len(self._log.ids) + decoded.usage.completion_tokens
                    rest = self._only_new(msgspec.json.encode(decoded.choices[0].text or "")[1:-1])
                    out += self._ending(rest, decoded.choices[0].finish_reason or "stop", made)
        return out

    def _only_new(self, text: bytes) -> bytes:
        """Raises `HelixError` when what is made again differs from what the client has, or ends before it."""
        new = self._catch_up.pass_on(msgspec.json.decode(b'"%b"' % text, type=str))
        if new is None or (self._tokens.finished and self._catch_up.left):
            self._generation.close()
            log.warning("stream.diverged", deployment=self._deployment, call_id=self._call.call_id)
            raise HelixError(ErrorKind.UPSTREAM_UNAVAILABLE, _BROKEN_OFF)
        return msgspec.json.encode(new)[1:-1]

    def _ending(self, text: bytes, reason: str, made: int) -> list[bytes]:
        """The last events: why it ends, and the usage of all replicas as that of one."""
        usage = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }
        end: dict[str, Any] = {
            "index": 0,
            "finish_reason": reason,
            **({"delta": {}} if self._is_chat else {"text": ""}),
        }
        out = [self._event(text)] if text else []
        return [*out, msgspec.json.encode({"choices": [end]}), msgspec.json.encode({"choices": [], "usage": usage})]

    async def _go_on(self, lost: HelixError) -> list[bytes] | None:
        """Goes on from another replica; returns the last events where nothing is left to make.

        Raises `lost` when none can, and DEADLINE when none could in time.
        """
        tokens, call = self._log, self._call
        self._generation.close()
        if self._tokens.finished:
            return [] if self._resumed or not self._is_chat else self._ending(b"", "", tokens.made)[1:]
        if not self._tokens.is_readable:
            raise lost
        if self._token_limit is not None and tokens.made >= self._token_limit:
            if self._catch_up.left:
                raise lost
            return self._ending(b"", "length", tokens.made)
        dead = self._generation.replica_id
        self._lost.add(dead)
        began = time.monotonic()
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
                tokens=len(tokens.ids),
                made_again=len(self._catch_up.left),
                exact=tokens.exact,
                waited_s=round(self._leased_at - began, 3),
                read_s=round(time.monotonic() - self._leased_at, 3),
            )
            return None
        raise lost

    async def _resume(self) -> None:
        """One attempt. Raises `HelixError` as `Slots.acquire` and `Generation.begin` do, INTERNAL when the tokens that
        the lost replica had read cannot be told.
        """
        slots, tokens = self._slots, self._log
        # Without another one, what was lost may come back, or was not lost at all.
        lease = await slots.acquire(self._call, avoid=self._lost if slots.has_alternative() else ())
        self._leased_at = time.monotonic()
        # Until it goes on: what fails here is not tried again while there is another one.
        self._lost.add(lease.replica.replica_id)
        try:
            if self._prompt is None:
                self._prompt = await self._read_prompt(lease.replica)
            await self._settle(lease.replica)
        except BaseException as exc:
            lease.release(failed=is_replica_fault(exc))
            raise
        limit = None if self._token_limit is None else self._token_limit - len(tokens.ids)
        payload = self._remainder(self._prompt + tokens.ids, limit)
        self._generation = await Generation.begin(
            self._client, lease, COMPLETIONS, payload, token_limit=limit, call=self._call
        )
        self._lost.discard(lease.replica.replica_id)
        self._tokens = CompletionTokens(tokens)
        self._resumed = True

    def _remainder(self, prompt: list[int], limit: int | None) -> dict[str, Raw]:
        """The request for what is missing."""
        payload = {name: value for name, value in self._payload.items() if name not in _CHAT_ONLY}
        payload |= COMPLETION_FIELDS
        payload["prompt"] = Raw(msgspec.json.encode(prompt))
        if limit is not None:
            payload["max_tokens"] = Raw(b"%d" % limit)
        if "seed" in payload:
            # The sampler starts anew: with the same seed it would draw the numbers of the beginning again.
            seed = msgspec.json.decode(payload["seed"], type=int)
            payload["seed"] = Raw(b"%d" % ((seed + len(self._log.ids)) & 0x7FFFFFFF))
        return payload

    async def _read_prompt(self, replica: Replica) -> list[int]:
        """The ids of the prompt, which must be as many as the first replica has read."""
        if self._is_chat:
            answer = await self._ask(replica, "/apply-template", self._payload, _Prompt)
            prompt: str | list[int] = answer.prompt
        else:
            prompt = msgspec.json.decode(self._payload["prompt"], type=str | list[int])
        if isinstance(prompt, str):
            question = {"content": prompt, "add_special": True, "parse_special": True}
            prompt = (await self._ask(replica, "/tokenize", question, _Ids)).tokens
        if len(prompt) != self.prompt_tokens:
            raise HelixError(ErrorKind.INTERNAL, f"The prompt has {len(prompt)} tokens, not {self.prompt_tokens}.")
        return prompt

    async def _settle(self, replica: Replica) -> None:
        """Makes what the lost replica has made part of what the next one reads."""
        tokens = self._log
        whole: list[Token] = []
        apart: dict[int, list[Token]] = {}
        if tokens.gaps(whole):
            whole = await self._tokenise(replica, tokens.text)
            gaps = tokens.gaps(whole)
            apart = {at: await self._tokenise(replica, gaps[at]) for at in list(gaps)[-_MOST_GAPS:]}
        again = tokens.settle(whole, apart)
        self._catch_up = CatchUp(again + self._catch_up.left)

    async def _tokenise(self, replica: Replica, text: str) -> list[Token]:
        answer = await self._ask(replica, "/tokenize", {"content": text, "with_pieces": True}, _Pieces)
        return [
            Token(token.id, len(token.piece.encode() if isinstance(token.piece, str) else token.piece))
            for token in answer.tokens
        ]

    async def _ask(self, replica: Replica, path: str, question: Mapping[str, Any], kind: type[_Answer]) -> _Answer:
        response = await request(self._client, replica, path, msgspec.json.encode(question), self._call.deadline)
        try:
            if response.status != 200:
                raise await refusal(response)
            return msgspec.json.decode(await response.read_all(_MAX_ANSWER_BYTES), type=kind)
        except msgspec.DecodeError as exc:
            raise HelixError(
                ErrorKind.UPSTREAM_INVALID, "The model's engine sent an answer that is not valid."
            ) from exc
        finally:
            response.close()
