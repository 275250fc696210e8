"""The vLLM engine: calls go as they came to the replicas that `Slots` hands out; see `dialects.openai_identity`.

vLLM ends a generation when its client's connection closes, streamed or not (measured: within one decoding step).
"""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Final

import msgspec
from msgspec import Raw

from helixflow.core.call import Call, Operation, Stream
from helixflow.core.capacity import Lease, Slots
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.openai_chat import ChatParams
from helixflow.dialects.openai_identity import Rename, StreamEditor, edit_answer
from helixflow.engines.answers import WholeAnswer
from helixflow.engines.media import check_media
from helixflow.engines.replica_faults import is_replica_fault, start_on_some
from helixflow.engines.vllm.adapter_slots import AdapterSlots
from helixflow.engines.vllm.generation import Generation, post
from helixflow.engines.vllm.resume import ResumingGeneration, is_plain
from helixflow.transport.client import HttpClient

_MAX_ANSWER_BYTES: Final = 64 * 2**20
_TRUE: Final = Raw(b"true")
_USAGE: Final = Raw(b'{"include_usage":true}')
# Fields of vLLM's own that steer the server, or that would change the form in which tokens are read here.
_CONTROLS: Final = frozenset(
    {
        *(
            "return_token_ids",
            "return_tokens_as_token_ids",
            "prompt_embeds",
            "kv_transfer_params",
            "ec_transfer_params",
        ),
        *("priority", "request_id", "cache_salt", "chat_template", "vllm_xargs", "return_prompt_text"),
    }
)


class VllmEngine:
    """One deployment of one model, served under `public_model`, and its LoRA `adapters` by name.

    `task` is what the model is for: "chat" or "embeddings". Streams of plain text outlive their replica, unless
    `rewrites` says that the server takes its answers apart (a reasoning parser).
    """

    def __init__(
        self,
        client: HttpClient,
        slots: Slots,
        *,
        deployment: str,
        public_model: str,
        task: str,
        adapters: Collection[str] = (),
        rewrites: bool = False,
    ) -> None:
        self._client = client
        self._deployment = deployment
        self._task = task
        self._model = Raw(msgspec.json.encode(public_model))
        names = (f"{public_model}:{name}" for name in adapters)
        self._adapters = {name: Raw(msgspec.json.encode(name)) for name in names}
        self._slots = AdapterSlots(slots, self._adapters) if self._adapters else slots
        self._rewrites = rewrites

    async def open(self, call: Call) -> Stream:
        """Returns when the first content is at hand (streams) or the whole answer is (otherwise)."""
        if (self._task == "embeddings") != (call.operation is Operation.EMBEDDINGS):
            instead = "embeddings" if self._task == "embeddings" else "chat/completions or completions"
            raise HelixError(
                ErrorKind.UNSUPPORTED,
                f"The model '{call.model}' cannot serve {call.operation.value}; use it with {instead}.",
                param="model",
            )
        if isinstance(call.params, ChatParams):
            check_media(call.params)
        # The client has seen nothing yet.
        return await start_on_some(partial(self._begin, call, self._fields(call)), self._slots)

    async def _begin(self, call: Call, fields: Mapping[str, Raw]) -> Stream:
        lease = await self._slots.acquire(call)
        try:
            return await (self._stream(call, fields, lease) if call.stream else self._read(call, fields, lease))
        except BaseException as exc:
            lease.release(failed=is_replica_fault(exc))
            if isinstance(exc, HelixError) and exc.kind is ErrorKind.CONTEXT_LENGTH_EXCEEDED:
                exc.param = exc.param or ("messages" if call.operation is Operation.CHAT else "prompt")
            raise

    async def _read(self, call: Call, fields: Mapping[str, Raw], lease: Lease) -> Stream:
        path = f"/v1/{call.operation.value}"
        response = await post(self._client, lease.replica, path, msgspec.json.encode(fields), call)
        try:
            body = await response.read_all(_MAX_ANSWER_BYTES)
        finally:
            response.close()
        edited = edit_answer(body, self._rename(call), call.progress)
        usage = call.progress.usage
        lease.charge(max(0, usage.prompt_tokens - usage.cached_tokens) + usage.completion_tokens)
        lease.release()
        return WholeAnswer(edited)

    async def _stream(self, call: Call, fields: Mapping[str, Raw], lease: Lease) -> Stream:
        path = f"/v1/{call.operation.value}"
        response = await post(self._client, lease.replica, path, msgspec.json.encode(fields), call)
        generation = Generation(response, lease, call)
        source: Generation | ResumingGeneration = generation
        if not self._rewrites and is_plain(call):
            source = ResumingGeneration(self._client, self._slots, self._deployment, fields, call, generation)
        editor = StreamEditor(self._rename(call), include_usage=call.include_usage, progress=call.progress)
        try:
            first = b""
            while not editor.started:
                data = await generation.read()
                if not data:
                    raise HelixError(ErrorKind.UPSTREAM_INVALID, "The model's engine ended before its first word.")
                if isinstance(source, ResumingGeneration):
                    source.note(data)
                first += editor.feed(data)
        except BaseException:
            response.close()
            raise
        return _VllmStream(source, editor, first)

    def _fields(self, call: Call) -> dict[str, Raw]:
        fields = {name: value for name, value in call.fields.items() if name not in _CONTROLS}
        fields["model"] = self._adapters.get(call.alias, self._model) if call.alias else self._model
        if call.stream:
            fields["stream_options"] = _USAGE
            fields["return_token_ids"] = _TRUE
        return fields

    def _rename(self, call: Call) -> Rename:
        return Rename(msgspec.json.encode(call.public_model), call.operation, call.call_id)


class _VllmStream:
    def __init__(self, source: Generation | ResumingGeneration, editor: StreamEditor, first: bytes) -> None:
        self._source = source
        self._editor = editor
        self._first = first

    async def read(self) -> bytes:
        if self._first:
            first, self._first = self._first, b""
            return first
        editor = self._editor
        while editor.failure is None:
            if editor.done:
                await self._source.finish()
                return b""
            if out := editor.feed(await self._source.read()):
                return out
        raise editor.failure

    def close(self) -> None:
        self._source.close()
