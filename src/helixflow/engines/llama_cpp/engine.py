"""The llama.cpp engine: calls become generations on the replicas that `Slots` hands out."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from helixflow.core.call import Call, Operation, Progress, Stream
from helixflow.core.capacity import Slots
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.openai_answers import DONE, ChatWriter
from helixflow.dialects.openai_chat import ChatParams
from helixflow.dialects.openai_completions import CompletionParams
from helixflow.dialects.openai_embeddings import EmbeddingParams
from helixflow.engines.answers import WholeAnswer
from helixflow.engines.llama_cpp.chat import ChatAssembly, ChatStream, add_usage, chat_payload
from helixflow.engines.llama_cpp.completions import Completions
from helixflow.engines.llama_cpp.embeddings import Embeddings
from helixflow.engines.llama_cpp.generation import EVENT, check_bias, start_generation
from helixflow.engines.llama_cpp.merge import Start, open_source
from helixflow.engines.llama_cpp.resume import CHAT, is_plain_chat, start_resuming
from helixflow.engines.llama_cpp.schema import check_schema
from helixflow.engines.llama_cpp.tools import ForcedTool
from helixflow.engines.media import check_media
from helixflow.transport.client import HttpClient


class LlamaCppEngine:
    """One deployment of one model. `task` is what the model is for: "chat" or "embeddings"."""

    def __init__(self, client: HttpClient, slots: Slots, *, deployment: str, task: str) -> None:
        self._client = client
        self._slots = slots
        self._deployment = deployment
        self._task = task
        self._embeddings = Embeddings(client, slots, deployment)
        self._completions = Completions(client, slots, deployment)

    async def open(self, call: Call) -> Stream:
        params = call.params
        if (self._task == "embeddings") != (call.operation is Operation.EMBEDDINGS):
            instead = "embeddings" if self._task == "embeddings" else "chat/completions or completions"
            raise HelixError(
                ErrorKind.UNSUPPORTED,
                f"The model '{call.model}' cannot serve {call.operation.value}; use it with {instead}.",
                param="model",
            )
        match params:
            case ChatParams():
                return await self._chat(call, params)
            case CompletionParams():
                return await self._completions.open(call, params)
            case EmbeddingParams():
                return await self._embeddings.open(call, params)
        raise HelixError(ErrorKind.UNSUPPORTED, f"The model '{call.model}' cannot serve {call.operation.value}.")

    async def _chat(self, call: Call, params: ChatParams) -> Stream:
        check_schema(params)
        check_media(params)
        forced = None
        if params.logit_bias:
            await check_bias(params.logit_bias, self._slots, call.deadline)
        if params.tools:
            replica = await self._slots.any_replica(call.deadline)
            forced = ForcedTool.needed(params, template_knows_tools=replica.supports_tools)
        start = (
            partial(start_resuming, self._client, self._slots, self._deployment)
            if is_plain_chat(call, params)
            else partial(start_generation, self._client, self._slots)
        )
        starts = [
            partial(start, CHAT, chat_payload(call, params, choice, forced), token_limit=params.token_limit, call=call)
            for choice in range(params.choices)
        ]
        if call.stream and forced is None:
            source, first = await open_source(starts, self._slots, call.deadline)
            return ChatStream(call, params, source, first, self._deployment)
        return await self._assemble(call, params, starts, forced)

    async def _assemble(
        self, call: Call, params: ChatParams, starts: Sequence[Start], forced: ForcedTool | None
    ) -> Stream:
        source, (index, events) = await open_source(starts, self._slots, call.deadline)
        progress = call.progress
        progress.first_content_at = time.perf_counter()
        progress.usage.prompt_tokens = source.prompt_tokens
        assemblies = [ChatAssembly(params) for _ in starts]
        counted = [0] * len(starts)
        try:
            while index >= 0:
                for event in map(EVENT.decode, events):
                    assemblies[index].add(event)
                    if event.usage is not None:
                        first = not progress.usage.reported
                        add_usage(progress, event.usage, new_prompt=first, counted=counted[index])
                    elif any(choice.delta for choice in event.choices):
                        counted[index] += 1
                        progress.usage.completion_tokens += 1
                index, events = await source.read()
        finally:
            source.close()
        choices = [assembly.choice(index) for index, assembly in enumerate(assemblies)]
        if forced is not None:
            texts = [assembly.text for assembly in assemblies]
            choices = [
                forced.finish(choice, text, f"{call.call_id[:20]}{choice['index']}")
                for choice, text in zip(choices, texts, strict=True)
            ]
        progress.finish_reason = choices[0]["finish_reason"]
        writer = ChatWriter(
            f"chatcmpl-{call.call_id}",
            int(time.time()),
            call.public_model,
            source.fingerprint,
            include_usage=call.include_usage,
        )
        progress.complete = True
        if call.stream:
            return WholeAnswer(_as_events(writer, choices, progress, include_usage=call.include_usage))
        return WholeAnswer(writer.answer(choices, progress.usage))


def _as_events(writer: ChatWriter, choices: list[dict[str, Any]], progress: Progress, *, include_usage: bool) -> bytes:
    """Finished choices as a stream: forced calls are only known to be whole at their end."""
    out = []
    for choice in choices:
        index = choice["index"]
        out.append(writer.role(index))
        for position, call in enumerate(choice["message"].get("tool_calls", ())):
            out.append(writer.chunk(index, {"tool_calls": [{"index": position, **call}]}, None, None))
        out.append(writer.chunk(index, {}, None, choice["finish_reason"]))
    if include_usage:
        out.append(writer.usage(progress.usage))
    return b"".join([*out, DONE])
