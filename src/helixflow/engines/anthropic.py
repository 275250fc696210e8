"""Servers that speak Anthropic's Messages API."""

import time
from collections.abc import Mapping

from helixflow.core.call import Call, Stream
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.anthropic_messages import MessagesReader, write_request
from helixflow.dialects.openai_chat import ChatParams
from helixflow.dialects.openai_neutral import read_request
from helixflow.engines.converted import open_chat
from helixflow.engines.provider import Provider
from helixflow.transport.client import HttpClient, Timeouts


class AnthropicEngine:
    """One deployment on an upstream server. Implements `Completer`, for chat only."""

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
        version: str,
        max_tokens: int,
    ) -> None:
        """`model` is the upstream's name for it, `max_tokens` limits answers of requests that do not.

        Raises `ValueError` for a base URL or header that cannot be sent.
        """
        own = {"anthropic-version": version, **({"x-api-key": api_key} if api_key is not None else {})}
        self._provider = Provider(
            client, deployment=deployment, base_url=base_url, headers={**own, **headers}, timeouts=timeouts
        )
        self._model = model
        self._max_tokens = max_tokens
        self.limits = self._provider.limits
        self._head = self._provider.head("/messages")
        self._probe_head = self._provider.head("/models", "GET")

    async def open(self, call: Call) -> Stream:
        """Returns when the first content is at hand (streams) or the whole answer is (otherwise)."""
        params = call.params
        if not isinstance(params, ChatParams):
            raise HelixError(
                ErrorKind.UNSUPPORTED,
                f"The model '{call.model}' cannot serve {call.operation.value}; use it with chat/completions.",
                param="model",
            )
        body = write_request(read_request(params, call.fields), self._model, self._max_tokens)
        call.progress.engine_began_at = time.perf_counter()
        provider = self._provider
        try:
            response = await provider.post(self._head, body, call)
            try:
                await provider.require_events(response)
            except BaseException:
                response.close()
                raise
            return await open_chat(provider, response, MessagesReader(), call)
        except HelixError as exc:
            provider.report(exc)
            raise

    async def probe(self, deadline: float) -> None:
        """Asks for the list of models, which costs nothing. Raises `HelixError` where the server does not give it."""
        await self._provider.get(self._probe_head, deadline)
