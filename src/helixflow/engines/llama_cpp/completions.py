"""(Legacy) completions on llama.cpp: prompts × choices, `echo`, `best_of`, the old shape of log-probabilities."""

import time
from functools import partial
from typing import Any

import msgspec
from msgspec import Raw

from helixflow.core.call import Call, Progress, Stream
from helixflow.core.capacity import Slots
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.openai_answers import DONE, CompletionWriter, end_of_stream
from helixflow.dialects.openai_completions import DEFAULT_MAX_TOKENS, CompletionParams, Prompt
from helixflow.engines.answers import WholeAnswer
from helixflow.engines.llama_cpp.chat import add_usage
from helixflow.engines.llama_cpp.generation import (
    ENGINE_CONTROLS,
    EVENT,
    Choice,
    check_bias,
    refusal,
    request,
    start_generation,
)
from helixflow.engines.llama_cpp.merge import Source, open_source
from helixflow.engines.llama_cpp.resume import COMPLETIONS, is_plain_completion, start_resuming
from helixflow.transport.client import HttpClient

_OURS = frozenset(
    {
        *("model", "prompt", "n", "best_of", "echo", "suffix", "stream", "stream_options", "max_tokens", "logprobs"),
        *("return_progress", "user", "seed", "metadata", *ENGINE_CONTROLS),
    }
)


class Completions:
    """The completions of one deployment."""

    def __init__(self, client: HttpClient, slots: Slots, deployment: str) -> None:
        self._client = client
        self._slots = slots
        self._deployment = deployment

    async def open(self, call: Call, params: CompletionParams) -> Stream:
        """Raises `HelixError` UNSUPPORTED for `suffix` and for scoring a prompt (`echo` with `logprobs`)."""
        if params.suffix:
            raise HelixError(
                ErrorKind.UNSUPPORTED, "This model cannot fill in the middle; leave out 'suffix'.", param="suffix"
            )
        if params.echo and params.logprobs is not None:
            raise HelixError(
                ErrorKind.UNSUPPORTED,
                "This engine cannot give log-probabilities of the prompt; leave out 'echo' or 'logprobs'.",
                param="logprobs",
            )
        if params.logit_bias:
            await check_bias(params.logit_bias, self._slots, call.deadline)
        prompts = params.prompts
        echoes = [await self._text_of(prompt, call.deadline) if params.echo else "" for prompt in prompts]
        if params.max_tokens == 0:
            return self._echo_only(call, params, echoes)
        best_of = max(params.best_of or 1, params.choices)
        start = (
            partial(start_resuming, self._client, self._slots, self._deployment)
            if is_plain_completion(call, params)
            else partial(start_generation, self._client, self._slots)
        )
        starts = [
            partial(
                start,
                COMPLETIONS,
                self._payload(call, params, prompt, choice, rank=best_of > params.choices),
                token_limit=params.max_tokens or DEFAULT_MAX_TOKENS,
                call=call,
            )
            for prompt in prompts
            for choice in range(best_of)
        ]
        source, first = await open_source(starts, self._slots, call.deadline)
        progress = call.progress
        progress.first_content_at = time.perf_counter()
        # Until it is reported: of one prompt of maybe several.
        progress.usage.prompt_tokens = source.prompt_tokens
        writer = CompletionWriter(
            f"cmpl-{call.call_id}",
            int(time.time()),
            call.public_model,
            source.fingerprint,
            include_usage=call.include_usage,
        )
        assemblies = [_Assembly(params.logprobs, echoes[index // best_of]) for index in range(len(starts))]
        stream = _CompletionStream(
            source, first, writer, progress, assemblies, best_of, include_usage=call.include_usage
        )
        if call.stream:
            return stream
        return await stream.assemble(params.choices, best_of)

    def _payload(
        self, call: Call, params: CompletionParams, prompt: Prompt, choice: int, *, rank: bool
    ) -> dict[str, Raw]:
        payload = {name: value for name, value in call.fields.items() if name not in _OURS and bytes(value) != b"null"}
        payload["prompt"] = Raw(msgspec.json.encode(prompt))
        payload["stream"] = payload["return_progress"] = Raw(b"true")
        payload["stream_options"] = Raw(b'{"include_usage":true}')
        limit = DEFAULT_MAX_TOKENS if params.max_tokens is None else params.max_tokens
        payload["max_tokens"] = Raw(b"%d" % limit)
        if params.seed is not None:
            payload["seed"] = Raw(b"%d" % ((params.seed + choice) & 0x7FFFFFFF))
        if params.logprobs is not None or rank:
            payload["logprobs"] = Raw(b"%d" % max(1, params.logprobs or 0))
        return payload

    async def _text_of(self, prompt: Prompt, deadline: float) -> str:
        if isinstance(prompt, str):
            return prompt
        replica = await self._slots.any_replica(deadline)
        response = await request(
            self._client, replica, "/detokenize", msgspec.json.encode({"tokens": prompt}), deadline
        )
        try:
            if response.status != 200:
                raise await refusal(response)
            body = await response.read_all(16 * 2**20)
        finally:
            response.close()
        return msgspec.json.decode(body, type=dict[str, str])["content"]

    def _echo_only(self, call: Call, params: CompletionParams, echoes: list[str]) -> Stream:
        progress = call.progress
        progress.first_content_at, progress.finish_reason = time.perf_counter(), "length"
        progress.complete = progress.usage.reported = True  # the engine had nothing to do
        writer = CompletionWriter(
            f"cmpl-{call.call_id}", int(time.time()), call.public_model, "", include_usage=call.include_usage
        )
        texts = [text for text in echoes for _ in range(params.choices)]
        if not call.stream:
            choices = [
                {"index": index, "text": text, "logprobs": None, "finish_reason": "length"}
                for index, text in enumerate(texts)
            ]
            return WholeAnswer(writer.answer(choices, progress.usage))
        chunks = [writer.chunk(index, text, None, "length") for index, text in enumerate(texts)]
        usage = writer.usage(progress.usage) if call.include_usage else b""
        return WholeAnswer(b"".join([*chunks, usage, DONE]))


class _Assembly:
    """One completion so far. `offset` counts characters, echoed prompt included."""

    def __init__(self, logprobs: int | None, echo: str) -> None:
        self.echo = echo
        self.text: list[str] = []
        self.finish_reason: str | None = None
        self.total_logprob = 0.0
        self.tokens = 0
        self._top = logprobs
        self._offset = len(echo)
        self._old: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    @property
    def mean_logprob(self) -> float:
        return self.total_logprob / max(1, self.tokens)

    @property
    def logprobs(self) -> dict[str, Any] | None:
        return self._old_shape(self._old) if self._top is not None else None

    def add(self, choice: Choice) -> dict[str, Any] | None:
        """Adds a chunk; returns its log-probabilities in the old shape, if they were asked for."""
        self.finish_reason = choice.finish_reason or self.finish_reason
        self.text.append(choice.text or "")
        entries = (choice.logprobs or {}).get("content") or ()
        if not entries and self._top is None:
            return None
        piece: dict[str, list[Any]] = {name: [] for name in self._old}
        for entry in entries:
            self.total_logprob += entry["logprob"]
            self.tokens += 1
            piece["tokens"].append(entry["token"])
            piece["token_logprobs"].append(entry["logprob"])
            piece["top_logprobs"].append({t["token"]: t["logprob"] for t in entry["top_logprobs"][: self._top or 0]})
            piece["text_offset"].append(self._offset)
            self._offset += len(entry["token"])
        if self._top is None:
            return None
        for name, values in piece.items():
            self._old[name] += values
        return self._old_shape(piece) if entries else None

    def _old_shape(self, piece: dict[str, list[Any]]) -> dict[str, Any]:
        return {**piece, "top_logprobs": piece["top_logprobs"] if self._top else None}

    def choice(self, index: int) -> dict[str, Any]:
        return {
            "index": index,
            "text": self.echo + "".join(self.text),
            "logprobs": self.logprobs,
            "finish_reason": self.finish_reason or "length",
        }


class _CompletionStream:
    def __init__(
        self,
        source: Source,
        first: tuple[int, list[bytes]],
        writer: CompletionWriter,
        progress: Progress,
        assemblies: list[_Assembly],
        best_of: int,
        *,
        include_usage: bool,
    ) -> None:
        self._progress = progress
        self._source = source
        self._first: tuple[int, list[bytes]] | None = first
        self._writer = writer
        self._assemblies = assemblies
        self._best_of = best_of
        self._include_usage = include_usage
        self._echoed: set[int] = set()
        # Tokens that `progress` counts before the engine reports them.
        self._counted: dict[int, int] = {}
        self._counted_prompts: set[int] = set()
        self._ended = False

    async def read(self) -> bytes:
        while not self._ended:
            index, events = await self._next()
            if index < 0:
                self._ended = self._progress.complete = True
                usage = self._writer.usage(self._progress.usage) if self._include_usage else b""
                return usage + end_of_stream(self._progress.resumed)
            out = b"".join([self._shape(index, event) for event in events])
            if out:
                return out
        return b""

    def close(self) -> None:
        self._source.close()

    async def assemble(self, choices: int, best_of: int) -> Stream:
        """Reads to the end; of each prompt's completions the `choices` most probable ones are kept."""
        try:
            while True:
                index, events = await self._next()
                if index < 0:
                    break
                for event in events:
                    self._shape(index, event)
        finally:
            self.close()
        kept = []
        for start in range(0, len(self._assemblies), best_of):
            group = self._assemblies[start : start + best_of]
            if best_of > choices:
                group = sorted(group, key=lambda assembly: assembly.mean_logprob, reverse=True)[:choices]
            kept += group
        answer = [assembly.choice(index) for index, assembly in enumerate(kept)]
        return WholeAnswer(self._writer.answer(answer, self._progress.usage))

    async def _next(self) -> tuple[int, list[bytes]]:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        return await self._source.read()

    def _shape(self, index: int, event: bytes) -> bytes:
        decoded = EVENT.decode(event)
        if decoded.usage is not None:
            prompt = index // self._best_of
            counted = self._counted.get(index, 0)
            add_usage(self._progress, decoded.usage, new_prompt=prompt not in self._counted_prompts, counted=counted)
            self._counted_prompts.add(prompt)
        assembly = self._assemblies[index]
        out = []
        for choice in decoded.choices:
            logprobs = assembly.add(choice)
            text = choice.text or ""
            if text and decoded.usage is None:
                self._counted[index] = self._counted.get(index, 0) + 1
                self._progress.usage.completion_tokens += 1
            if index not in self._echoed and (text or choice.finish_reason):
                self._echoed.add(index)
                text = assembly.echo + text
            self._progress.finish_reason = choice.finish_reason or self._progress.finish_reason
            if text or choice.finish_reason:
                out.append(self._writer.chunk(index, text, logprobs, choice.finish_reason))
        return b"".join(out)
