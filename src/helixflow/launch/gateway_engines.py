"""Which class serves which kind of deployment, and what it is made of. The one place that knows all engine kinds."""

import os
import re
from collections.abc import Callable, Mapping
from ssl import SSLContext
from typing import Final, TypedDict

from helixflow.core.call import Completer
from helixflow.core.capacity import Slots
from helixflow.core.errors import ExitCode, UserError
from helixflow.engines.anthropic import AnthropicEngine
from helixflow.engines.llama_cpp.engine import LlamaCppEngine
from helixflow.engines.ollama import OllamaEngine
from helixflow.engines.openai import OpenAIEngine
from helixflow.engines.vllm.engine import VllmEngine
from helixflow.settings.deployments import (
    AnthropicDeployment,
    Deployment,
    LlamaCppDeployment,
    OllamaDeployment,
    OpenAIDeployment,
    Provider,
    ProviderDeployment,
    VllmDeployment,
)
from helixflow.settings.masking import VARIABLE
from helixflow.transport.client import HttpClient, Timeouts
from helixflow.transport.tls import client_context

_IDLE_EXPIRY_S: Final = 4.0
# Engines hold a slot a generation: more connections than this to one replica would be a fault of ours.
_ENGINE_CONNECTIONS: Final = 1024


class EngineBuilder:
    """Builds engines. Those on replicas share one HTTP client, which `close` closes; each provider has its own."""

    def __init__(self, tls: Callable[[], SSLContext]) -> None:
        """`tls` gives the context for replicas on other nodes, and is asked with each connection."""
        self._replicas = HttpClient(max_connections=_ENGINE_CONNECTIONS, idle_expiry_s=_IDLE_EXPIRY_S, ssl_context=tls)

    def build(
        self, name: str, public_model: str, deployment: Deployment, slots: Slots | None
    ) -> tuple[Completer, HttpClient | None]:
        """The engine, and the HTTP client to close when it is not needed any more, if it has one of its own.

        `slots` are those of a deployment that a pool launches.

        Raises `UserError` (CONFIG) for a deployment that cannot be built.
        """
        match deployment:
            case LlamaCppDeployment():
                assert slots is not None
                return LlamaCppEngine(self._replicas, slots, deployment=name, task=deployment.task), None
            case VllmDeployment():
                assert slots is not None
                return _build_vllm(self._replicas, slots, name, public_model, deployment), None
            case OpenAIDeployment() | AnthropicDeployment() | OllamaDeployment():
                try:
                    client = _client_of(deployment)
                    return _build_provider(client, name, public_model, deployment), client
                except (ValueError, OSError) as exc:
                    raise UserError(f"the deployment {name}: {exc}", ExitCode.CONFIG) from exc

    async def close(self) -> None:
        await self._replicas.close()


def _build_vllm(
    client: HttpClient, slots: Slots, name: str, public_model: str, deployment: VllmDeployment
) -> VllmEngine:
    return VllmEngine(
        client,
        slots,
        deployment=name,
        public_model=public_model,
        task=deployment.task,
        adapters=deployment.lora,
        rewrites=any(argument.startswith("--reasoning-parser") for argument in deployment.extra_arguments),
    )


def _client_of(deployment: ProviderDeployment) -> HttpClient:
    context = client_context(deployment.ca_file) if deployment.ca_file is not None else None
    return HttpClient(max_connections=deployment.max_connections, idle_expiry_s=_IDLE_EXPIRY_S, ssl_context=context)


def _build_provider(client: HttpClient, name: str, public_model: str, deployment: Provider) -> Completer:
    """Raises `ValueError` for a key that cannot be read, and for what cannot be sent."""
    common = _Common(
        deployment=name,
        base_url=deployment.base_url,
        model=deployment.model or public_model,
        api_key=deployment.api_key.read() if deployment.api_key is not None else None,
        headers=expand_headers(deployment.headers),
        timeouts=timeouts_of(deployment),
    )
    match deployment:
        case OpenAIDeployment():
            return OpenAIEngine(client, **common)
        case AnthropicDeployment(version=version, max_tokens=max_tokens):
            return AnthropicEngine(client, version=version, max_tokens=max_tokens, **common)
        case OllamaDeployment(context=context):
            return OllamaEngine(client, context=context, **common)


class _Common(TypedDict):
    """What all providers' engines are made of."""

    deployment: str
    base_url: str
    model: str
    api_key: str | None
    headers: Mapping[str, str]
    timeouts: Timeouts


def timeouts_of(deployment: ProviderDeployment) -> Timeouts:
    return Timeouts(
        connect_s=deployment.connect_timeout_s,
        first_byte_s=deployment.first_byte_timeout_s,
        idle_s=deployment.idle_timeout_s,
    )


def expand_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Values with `${NAME}` replaced by the environment. Raises `ValueError` for a variable that is not set."""
    return {name: VARIABLE.sub(_look_up, value) for name, value in headers.items()}


def _look_up(match: re.Match[str]) -> str:
    if match[1] not in os.environ:
        raise ValueError(f"the environment variable {match[1]} is not set")
    return os.environ[match[1]]
