"""vLLM as the pool starts it: its command, and asking it how it is (`/health`, `/metrics`, and
once `/v1/models`), and changing its adapters.
"""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.engines.launching import HOST, EngineCommand, EngineProperties, LaunchSpec, Settled
from helixflow.engines.vllm.command import build
from helixflow.engines.vllm.lora import loaded_adapters, reconcile, wanted_adapters
from helixflow.settings.deployments import Launched, VllmDeployment
from helixflow.transport.client import HttpClient
from helixflow.transport.origin import Origin
from helixflow.transport.request import Timeouts, build_head

_MAX_BODY_BYTES: Final = 16 << 20
# An adapter is read from its folder, or fetched.
_ADAPTER_DEADLINE_S: Final = 120.0
# All weights are copied to RAM, or back.
_SLEEP_DEADLINE_S: Final = 120.0
_TOOLS_FLAG: Final = "--enable-auto-tool-choice"
# Gauges with labels: `name{engine="0",model_name="m"} 1.0`, one for each engine core.
_ACTIVE: Final = (b"vllm:num_requests_running{", b"vllm:num_requests_waiting{")


class _Model(msgspec.Struct):
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class _Sleeping(msgspec.Struct):
    is_sleeping: bool


class _TextConfig(msgspec.Struct):
    vocab_size: int = 0


class _Config(msgspec.Struct):
    vocab_size: int = 0
    text_config: _TextConfig = msgspec.field(default_factory=_TextConfig)


class VllmKind:
    """Implements `SleepingKind` on loopback."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client

    def command(self, spec: LaunchSpec) -> EngineCommand:
        deployment = spec.deployment
        assert isinstance(deployment, VllmDeployment)
        return build(deployment, spec)

    async def is_healthy(self, port: int, key: str, deadline_s: float) -> bool:
        """True for 200; it listens only once its model is loaded, and says 503 when its core has died."""
        status, _ = await self._get("/health", port, key, deadline_s)
        return status == 200

    async def read_properties(self, deployment: Launched, port: int, key: str, deadline_s: float) -> EngineProperties:
        """Raises `HelixError` (UPSTREAM_INVALID) when it does not accept the key or is no vLLM server."""
        assert isinstance(deployment, VllmDeployment)
        status, body = await self._get("/v1/models", port, key, deadline_s)
        if status != 200:
            raise HelixError(ErrorKind.UPSTREAM_INVALID, f"The engine answered /v1/models with status {status}.")
        try:
            models = msgspec.json.decode(body, type=_Models).data
        except msgspec.DecodeError as exc:
            raise HelixError(ErrorKind.UPSTREAM_INVALID, "The engine's list of models is not vLLM's.") from exc
        context = next((model.max_model_len for model in models if model.max_model_len), deployment.context)
        return EngineProperties(
            deployment.parallel,
            context,
            _TOOLS_FLAG in deployment.extra_arguments,
            await asyncio.to_thread(_read_vocabulary, deployment.model),
        )

    async def settle(self, deployment: Launched, public_name: str, port: int, key: str, deadline_s: float) -> Settled:
        """Its LoRA adapters. Raises `HelixError` (UPSTREAM_INVALID) when it does not list its models."""
        assert isinstance(deployment, VllmDeployment)
        if not deployment.lora_slots:
            return Settled()

        async def post(target: str, body: Mapping[str, str]) -> tuple[int, bytes]:
            return await self._ask("POST", target, port, key, _ADAPTER_DEADLINE_S, msgspec.json.encode(body))

        status, answer = await self._get("/v1/models", port, key, deadline_s)
        if status != 200:
            raise HelixError(ErrorKind.UPSTREAM_INVALID, f"The engine answered /v1/models with status {status}.")
        return await reconcile(post, wanted_adapters(deployment, public_name), loaded_adapters(answer))

    async def read_activity(self, port: int, key: str, deadline_s: float) -> int:
        """Raises `HelixError` (UPSTREAM_INVALID) when it does not tell."""
        status, body = await self._get("/metrics", port, key, deadline_s)
        figures = [line.rpartition(b" ")[2] for line in body.splitlines() if line.startswith(_ACTIVE)]
        if status != 200 or not figures:
            raise HelixError(ErrorKind.UPSTREAM_INVALID, "The engine does not tell how many generations it runs.")
        try:
            return sum(int(float(figure)) for figure in figures)
        except (ValueError, OverflowError) as exc:
            raise HelixError(ErrorKind.UPSTREAM_INVALID, "The engine's metrics are not valid.") from exc

    def can_sleep(self, deployment: Launched) -> bool:
        assert isinstance(deployment, VllmDeployment)
        return deployment.sleep_when_idle

    async def sleep(self, port: int, key: str) -> None:
        await self._turn("/sleep?level=1", port, key)

    async def wake(self, port: int, key: str) -> None:
        await self._turn("/wake_up", port, key)

    async def is_asleep(self, port: int, key: str, deadline_s: float) -> bool:
        """Raises `HelixError` (UPSTREAM_INVALID) when it does not tell."""
        status, body = await self._get("/is_sleeping", port, key, deadline_s)
        try:
            return status == 200 and msgspec.json.decode(body, type=_Sleeping).is_sleeping
        except msgspec.DecodeError as exc:
            raise HelixError(ErrorKind.UPSTREAM_INVALID, "The engine does not tell whether it sleeps.") from exc

    async def _turn(self, target: str, port: int, key: str) -> None:
        status, _ = await self._ask("POST", target, port, key, _SLEEP_DEADLINE_S)
        if status != 200:
            raise HelixError(ErrorKind.UPSTREAM_INVALID, f"The engine answered {target} with status {status}.")

    async def _get(self, target: str, port: int, key: str, deadline_s: float) -> tuple[int, bytes]:
        return await self._ask("GET", target, port, key, deadline_s)

    async def _ask(
        self, method: str, target: str, port: int, key: str, deadline_s: float, body: bytes = b""
    ) -> tuple[int, bytes]:
        origin = Origin("http", HOST, port)
        headers = [("authorization", f"Bearer {key}")]
        if body:
            headers.append(("content-type", "application/json"))
        head = build_head(method, target, origin, headers)
        timeouts = Timeouts(connect_s=deadline_s, first_byte_s=deadline_s, idle_s=deadline_s)
        response = await self._client.request(origin, head, body, timeouts=timeouts)
        return response.status, await response.read_all(_MAX_BODY_BYTES)


def _read_vocabulary(model: str) -> int:
    """The number of token ids as the model's folder says; 0 where it is not known. Blocks."""
    try:
        config = msgspec.json.decode((Path(model).expanduser() / "config.json").read_bytes(), type=_Config)
    except (OSError, msgspec.DecodeError):
        return 0
    return config.vocab_size or config.text_config.vocab_size
