"""Embeddings on llama.cpp: text is tokenised here by the model's own `tokenizer.json` and sent as ids, because
llama.cpp's tokeniser differs for several scripts (Korean, Hindi, Bengali).
"""

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from helixflow.core.call import Call, Stream
from helixflow.core.capacity import Replica, Slots
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.openai_embeddings import EmbeddingParams, encode_embeddings
from helixflow.engines.answers import WholeAnswer
from helixflow.engines.llama_cpp.generation import refusal, request
from helixflow.engines.replica_faults import is_replica_fault, start_on_some
from helixflow.transport.client import HttpClient

if TYPE_CHECKING:
    from helixflow.engines.tokenizer import TextTokenizer

MAX_ANSWER_BYTES = 64 * 2**20


class _Vector(Struct, frozen=True):
    embedding: list[float]


class _Answer(Struct, frozen=True):
    data: list[_Vector]


_ANSWER = msgspec.json.Decoder(_Answer)


class Embeddings:
    """The embeddings of one deployment. The tokenizer is loaded with the first request."""

    def __init__(self, client: HttpClient, slots: Slots, deployment: str) -> None:
        self._client = client
        self._slots = slots
        self._deployment = deployment
        self._tokenizer: TextTokenizer | None = None

    async def open(self, call: Call, params: EmbeddingParams) -> Stream:
        """Raises `HelixError`: CONTEXT_LENGTH_EXCEEDED for too long an input, UNSUPPORTED for other `dimensions`."""
        replica = await self._slots.any_replica(call.deadline)
        tokens = await asyncio.to_thread(self._tokenise, params.inputs, replica)
        call.progress.engine_began_at = time.perf_counter()
        vectors = [await self._embed(tokens[0], call)]
        if params.dimensions is not None and params.dimensions != len(vectors[0]):
            raise HelixError(
                ErrorKind.UNSUPPORTED,
                f"The model '{call.model}' always gives {len(vectors[0])} dimensions; leave out 'dimensions'.",
                param="dimensions",
            )
        vectors += await self._embed_all(tokens[1:], replica.slots, call)
        progress = call.progress
        progress.first_content_at = time.perf_counter()
        progress.usage.prompt_tokens = sum(map(len, tokens))
        progress.usage.reported = True
        body = encode_embeddings(call.public_model, vectors, progress.usage.prompt_tokens, params.encoding_format)
        return WholeAnswer(body)

    def _tokenise(self, inputs: Sequence[str | list[int]], replica: Replica) -> list[list[int]]:
        from helixflow.engines.tokenizer import TextTokenizer  # costs memory: only where embeddings are asked for

        if self._tokenizer is None:
            self._tokenizer = TextTokenizer(replica.tokenizer_path)
        tokenizer = self._tokenizer
        begin, end = tokenizer.encode("")
        tokens = []
        for index, entry in enumerate(inputs):
            name = "input" if len(inputs) == 1 else f"input[{index}]"
            ids = tokenizer.encode(entry) if isinstance(entry, str) else entry
            if not isinstance(entry, str):
                if max(ids) >= tokenizer.size:
                    raise HelixError(
                        ErrorKind.INVALID_VALUE,
                        f"'{name}' has the token id {max(ids)}; this model's ids end at {tokenizer.size - 1}.",
                        param=name,
                    )
                if ids[0] != begin:
                    ids = [begin, *ids, end]
            if len(ids) > replica.context:
                raise HelixError(
                    ErrorKind.CONTEXT_LENGTH_EXCEEDED,
                    f"This model's maximum input is {replica.context} tokens, but '{name}' has {len(ids)}. Shorten it.",
                    param=name,
                )
            tokens.append(ids)
        return tokens

    async def _embed_all(self, tokens: list[list[int]], slots: int, call: Call) -> list[list[float]]:
        """One vector an input, in order. A lease an input, so that what is in flight never exceeds the slots."""
        vectors: list[list[float]] = [[] for _ in tokens]
        positions = iter(range(len(tokens)))

        async def work() -> None:
            for position in positions:
                vectors[position] = await self._embed(tokens[position], call)

        workers = [asyncio.create_task(work()) for _ in range(min(len(tokens), slots))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
        return vectors

    async def _embed(self, tokens: list[int], call: Call) -> list[float]:
        """The vector of one input."""
        return await start_on_some(partial(self._ask, tokens, call), self._slots)

    async def _ask(self, tokens: list[int], call: Call) -> list[float]:
        lease = await self._slots.acquire(call)
        failed = True
        try:
            body = msgspec.json.encode({"input": tokens, "encoding_format": "float"})
            response = await request(self._client, lease.replica, "/v1/embeddings", body, call.deadline)
            try:
                if response.status != 200:
                    raise await refusal(response)
                answer = _ANSWER.decode(await response.read_all(MAX_ANSWER_BYTES))
                lease.charge(len(tokens))
            finally:
                response.close()
            failed = False
        except msgspec.DecodeError as exc:
            raise HelixError(
                ErrorKind.UPSTREAM_INVALID, "The model's engine sent an answer that is not valid."
            ) from exc
        except HelixError as exc:
            failed = is_replica_fault(exc)
            raise
        except asyncio.CancelledError:
            failed = False
            raise
        finally:
            lease.release(failed=failed)
        if len(answer.data) != 1:
            raise HelixError(ErrorKind.UPSTREAM_INVALID, "The model's engine sent an answer that is not valid.")
        return answer.data[0].embedding
