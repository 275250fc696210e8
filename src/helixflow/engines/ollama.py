"""Ollama servers, over their own API."""

import time
from collections.abc import Mapping

from helixflow.core.call import Call, Stream
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.ollama_chat import OllamaReader, write_request
from helixflow.dialects.ollama_completions import read_embed, write_embed, write_generate
from helixflow.dialects.openai_chat import ChatParams
from helixflow.dialects.openai_completions import CompletionParams
from helixflow.dialects.openai_embeddings import EmbeddingParams, encode_embeddings
from helixflow.dialects.openai_events import UsageBody
from helixflow.dialects.openai_neutral import read_request
from helixflow.engines.answers import WholeAnswer
from helixflow.engines.converted import open_chat, open_completion
from helixflow.engines.counting import estimate_prompt
from helixflow.engines.provider import MAX_ANSWER_BYTES, Provider
from helixflow.transport.client import HttpClient, Timeouts


class OllamaEngine:
    """One deployment on an upstream server. Implements `Completer`."""

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
        context: int,
    ) -> None:
        """`model` is the upstream's name for it, `context` the size it is loaded with there, tokens.

        Raises `ValueError` for a base URL or header that cannot be sent.
        """
        own = {"authorization": f"Bearer {api_key}"} if api_key is not None else {}
        self._provider = Provider(
            client, deployment=deployment, base_url=base_url, headers={**own, **headers}, timeouts=timeouts
        )
        self._model = model
        self._context = context
        self._chat_head = self._provider.head("/api/chat")
        self._generate_head = self._provider.head("/api/generate")
        self._embed_head = self._provider.head("/api/embed")
        self._probe_head = self._provider.head("/api/version", "GET")

    async def open(self, call: Call) -> Stream:
        """Returns when the first content is at hand (streams) or the whole answer is (otherwise)."""
        try:
            match call.params:
                case ChatParams() as chat:
                    return await self._chat(call, chat)
                case CompletionParams() as completion:
                    return await self._complete(call, completion)
                case EmbeddingParams() as embedding:
                    return await self._embed(call, embedding)
        except HelixError as exc:
            self._provider.report(exc)
            raise
        raise HelixError(ErrorKind.UNSUPPORTED, f"The model '{call.model}' cannot serve {call.operation.value}.")

    async def probe(self, deadline: float) -> None:
        """Asks for the version. Raises `HelixError` where the server does not tell it."""
        await self._provider.get(self._probe_head, deadline)

    async def _chat(self, call: Call, params: ChatParams) -> Stream:
        body = write_request(read_request(params, call.fields), self._model, self._context)
        call.progress.engine_began_at = time.perf_counter()
        response = await self._provider.post(self._chat_head, body, call)
        return await open_chat(self._provider, response, OllamaReader(f"call_{call.call_id[:20]}"), call)

    async def _complete(self, call: Call, params: CompletionParams) -> Stream:
        body = write_generate(params, call.fields, self._model, self._context)
        call.progress.engine_began_at = time.perf_counter()
        response = await self._provider.post(self._generate_head, body, call)
        return await open_completion(self._provider, response, OllamaReader(""), call)

    async def _embed(self, call: Call, params: EmbeddingParams) -> Stream:
        body = write_embed(params, self._model)
        call.progress.engine_began_at = time.perf_counter()
        response = await self._provider.post(self._embed_head, body, call)
        try:
            answer = read_embed(await response.read_all(MAX_ANSWER_BYTES), len(params.inputs))
        except BaseException:
            response.close()
            raise
        usage = call.progress.usage
        UsageBody(answer.prompt_eval_count).copy_to(usage)
        if not usage.reported:
            usage.prompt_tokens = estimate_prompt(call)
        return WholeAnswer(
            encode_embeddings(call.public_model, answer.embeddings, usage.prompt_tokens, params.encoding_format)
        )
