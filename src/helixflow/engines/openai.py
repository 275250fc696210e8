"""Any server that speaks OpenAI's API: real providers, vLLM, other gateways. Their bytes pass as they came, see
`dialects.openai_identity`.
"""

import time
from collections.abc import Mapping

import msgspec
from msgspec import Raw

from helixflow.core.call import Call, Operation, Stream
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.openai_chat import ChatParams
from helixflow.dialects.openai_completions import CompletionParams
from helixflow.dialects.openai_identity import CONTENT_FILTER, Rename, StreamEditor, edit_answer
from helixflow.dialects.provider_errors import content_filtered
from helixflow.engines.answers import WholeAnswer
from helixflow.engines.counting import TokenCounter, answer_text
from helixflow.engines.provider import MAX_ANSWER_BYTES, Provider, settle
from helixflow.transport.client import HttpClient, HttpResponse, Timeouts

_USAGE_OPTIONS = Raw(b'{"include_usage":true}')


class OpenAIEngine:
    """One deployment on an upstream server."""

    def __init__(
        self,
        client: HttpClient,
        *,
        deployment: str,
        base_url: str,
        model: str,
        api_key: str | None,
        headers: Mapping[str, str],
        timeouts: Timeouts,
    ) -> None:
        """`model` is the upstream's name for it. Raises `ValueError` for a base URL or header that cannot be sent."""
        self._model = Raw(msgspec.json.encode(model))
        own = {"authorization": f"Bearer {api_key}"} if api_key is not None else {}
        self._provider = provider = Provider(
            client, deployment=deployment, base_url=base_url, headers={**own, **headers}, timeouts=timeouts
        )
        self._heads = {operation: provider.head(f"/{operation.value}") for operation in Operation}
        self._models_head = provider.head("/models", "GET")
        self.limits = provider.limits
        self._counter = TokenCounter(client, provider.origin, list(provider.headers.items()), model)

    async def open(self, call: Call) -> Stream:
        """Returns when the first content is at hand (streams) or the whole answer is (otherwise)."""
        call.progress.engine_began_at = time.perf_counter()
        try:
            response = await self._provider.post(self._heads[call.operation], self._request_body(call), call)
            try:
                return await (self._begin(call, response) if call.stream else self._read(call, response))
            except BaseException:
                response.close()
                raise
        except HelixError as exc:
            self._provider.report(exc)
            raise

    async def probe(self, deadline: float) -> None:
        """Asks for the list of models. Raises `HelixError` where the server does not give it."""
        await self._provider.get(self._models_head, deadline)

    async def _read(self, call: Call, response: HttpResponse) -> Stream:
        body = await response.read_all(MAX_ANSWER_BYTES)
        progress = call.progress
        edited = edit_answer(
            body, Rename(msgspec.json.encode(call.public_model), call.operation, call.call_id), progress
        )
        usage = progress.usage
        if progress.finish_reason == CONTENT_FILTER and _is_of_one(call) and not answer_text(body):
            raise content_filtered()
        if not usage.reported or (not usage.completion_tokens and call.operation is not Operation.EMBEDDINGS):
            await self._count(call, body)
        return WholeAnswer(edited)

    async def _begin(self, call: Call, response: HttpResponse) -> Stream:
        await self._provider.require_events(response)
        rename = Rename(msgspec.json.encode(call.public_model), call.operation, call.call_id)
        editor = StreamEditor(rename, include_usage=call.include_usage, progress=call.progress)
        first = b""
        while not editor.started:
            data = await response.read()
            if not data:
                raise HelixError(
                    ErrorKind.UPSTREAM_INVALID, "The model's server ended the stream before its first word."
                )
            first += editor.feed(data)
        if editor.filtered and _is_of_one(call):
            raise content_filtered()
        return _EditedStream(self._provider, response, editor, first, call, self._counter)

    async def _count(self, call: Call, body: bytes) -> None:
        """What a whole answer's usage does not tell."""
        text = answer_text(body)
        if text or not call.progress.usage.reported:
            call.progress.usage.reported = False
            await self._counter.fill(call, text)

    def _request_body(self, call: Call) -> bytes:
        fields = call.fields.copy()
        fields["model"] = self._model
        if call.stream:
            fields["stream_options"] = _stream_options(fields.get("stream_options"))
        return msgspec.json.encode(fields)


class _EditedStream:
    def __init__(
        self,
        provider: Provider,
        response: HttpResponse,
        editor: StreamEditor,
        first: bytes,
        call: Call,
        counter: TokenCounter,
    ) -> None:
        self._provider = provider
        self._response = response
        self._editor = editor
        self._first = first
        self._call = call
        self._counter = counter

    async def read(self) -> bytes:
        try:
            piece = await self._read()
        except HelixError as exc:
            self._provider.report(exc)
            raise
        progress = self._call.progress
        if progress.complete and piece and not progress.usage.reported:
            # The events were counted as they came.
            await self._counter.fill(self._call, None)
        return piece

    async def _read(self) -> bytes:
        if self._first:
            first, self._first = self._first, b""
            return first
        editor = self._editor
        while editor.failure is None:
            if editor.done:
                await settle(self._response)
                return b""
            data = await self._response.read()
            if not data:
                raise HelixError(
                    ErrorKind.UPSTREAM_INVALID, "The model's server broke off in the middle of its answer."
                )
            out = editor.feed(data)
            if out:
                return out
        raise editor.failure

    def close(self) -> None:
        self._response.close()


def _is_of_one(call: Call) -> bool:
    """Of several choices others may have an answer although a filter took one."""
    match call.params:
        case ChatParams() as chat:
            return chat.choices == 1
        case CompletionParams() as completion:
            return completion.choices * len(completion.prompts) == 1
    return False


def _stream_options(options: Raw | None) -> Raw:
    """The client's stream options with `include_usage` on: we always learn the usage."""
    if options is None or bytes(options) == b"null":
        return _USAGE_OPTIONS
    merged = msgspec.json.decode(options, type=dict[str, Raw])
    merged["include_usage"] = Raw(b"true")
    return Raw(msgspec.json.encode(merged))
