"""Generate of PoolService: a request of the OpenAI dialect from a peer that speaks gRPC, answered by this node."""

import asyncio
import re
import secrets
from collections.abc import AsyncGenerator, Callable
from typing import Final

from helixflow.core.call import Call, Completer, Operation
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.principal import Principal, PrincipalKind
from helixflow.dialects.openai_chat import ChatParams, parse_chat
from helixflow.dialects.openai_completions import CompletionParams, parse_completion
from helixflow.dialects.openai_embeddings import EmbeddingParams, parse_embedding
from helixflow.dialects.validation import decode_fields
from helixflow.rpc.generated.pool_v1 import pool_pb2

# A message of gRPC takes 4 MiB.
PIECE_BYTES: Final = 1 << 20
_CALL_ID: Final = re.compile(r"[0-9A-Za-z_-]{16,64}")
_MAX_NAME: Final = 200
Params = ChatParams | CompletionParams | EmbeddingParams
_PARSERS: Final[dict[Operation, Callable[[bytes], Params]]] = {
    Operation.CHAT: parse_chat,
    Operation.COMPLETIONS: parse_completion,
    Operation.EMBEDDINGS: parse_embedding,
}


class Generator:
    """Answers requests through `completer`; none takes longer than `longest_s`.

    Who is asked for is the peer's word: `organisation` and `key` say whose turn it is where slots are waited for, and
    nothing is metered here.
    """

    def __init__(self, completer: Completer, *, longest_s: float) -> None:
        self._completer = completer
        self._longest_s = longest_s

    async def generate(self, request: pool_pb2.GenerateRequest) -> AsyncGenerator[pool_pb2.GenerateResponse, None]:
        """Pieces as they are made, and at the end one without data that says what was used. Closing it ends the
        generation. Raises `HelixError`, as the HTTP API would answer, also in the middle of an answer.
        """
        call = self._parse(request)
        stream = await self._completer.open(call)
        try:
            while data := await stream.read():
                for start in range(0, len(data), PIECE_BYTES):
                    yield pool_pb2.GenerateResponse(data=data[start : start + PIECE_BYTES])
        except HelixError as exc:
            call.progress.failure = exc.kind
            raise
        finally:
            stream.close()
        usage = call.progress.usage
        yield pool_pb2.GenerateResponse(
            usage=pool_pb2.GenerateUsage(
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                cached_tokens=usage.cached_tokens,
                finish_reason=call.progress.finish_reason or "",
            )
        )

    def _parse(self, request: pool_pb2.GenerateRequest) -> Call:
        try:
            operation = Operation(request.operation)
        except ValueError as exc:
            known = ", ".join(one.value for one in Operation)
            raise HelixError(ErrorKind.INVALID_VALUE, f"'operation' is one of {known}.", param="operation") from exc
        fields = decode_fields(request.body)
        params = _PARSERS[operation](request.body)
        streams = include_usage = False
        if not isinstance(params, EmbeddingParams):
            streams = bool(params.stream)
            include_usage = params.stream_options is not None and bool(params.stream_options.include_usage)
        asked_s = request.deadline_ms / 1000 or self._longest_s
        call_id = request.call_id if _CALL_ID.fullmatch(request.call_id) else secrets.token_hex(16)
        return Call(
            call_id,
            call_id,
            _principal_of(request),
            operation,
            params.model,
            fields,
            params,
            streams,
            include_usage,
            asyncio.get_running_loop().time() + min(asked_s, self._longest_s),
            len(request.body),
        )


def _principal_of(request: pool_pb2.GenerateRequest) -> Principal:
    return Principal(
        kind=PrincipalKind.KEY,
        id=request.key[:_MAX_NAME],
        name="",
        organisation_id=request.organisation[:_MAX_NAME],
        project_id="",
    )
