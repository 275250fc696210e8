"""llama.cpp as the pool starts it: its command, and asking it how it is (`/health`, `/slots`, and once `/props` and
`/v1/models`).
"""

from typing import Final

import msgspec

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.engines.launching import HOST, EngineCommand, EngineProperties, LaunchSpec, Settled
from helixflow.engines.llama_cpp.command import build
from helixflow.settings.deployments import Launched, LlamaCppDeployment
from helixflow.transport.client import HttpClient
from helixflow.transport.origin import Origin
from helixflow.transport.request import Timeouts, build_head

_MAX_BODY_BYTES: Final = 4 << 20


class _Generation(msgspec.Struct):
    n_ctx: int


class _Capabilities(msgspec.Struct):
    supports_tools: bool = False


class _Props(msgspec.Struct):
    total_slots: int
    default_generation_settings: _Generation
    chat_template_caps: _Capabilities = msgspec.field(default_factory=_Capabilities)


class _ModelMeta(msgspec.Struct):
    n_vocab: int = 0


class _Model(msgspec.Struct):
    meta: _ModelMeta | None = None


class _Models(msgspec.Struct):
    data: list[_Model] = []


class _Slot(msgspec.Struct):
    is_processing: bool


class LlamaCppKind:
    """Implements `EngineKind` on loopback."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client

    def command(self, spec: LaunchSpec) -> EngineCommand:
        deployment = spec.deployment
        assert isinstance(deployment, LlamaCppDeployment)
        assert spec.model_path is not None
        command = build(
            deployment, model_path=spec.model_path, port=spec.port, key=spec.key, public_name=spec.public_name
        )
        if not spec.gpus:
            return command
        devices = {"CUDA_VISIBLE_DEVICES": ",".join(spec.gpus)}
        return EngineCommand(command.argv, {**command.env, **devices}, command.stdin)

    async def is_healthy(self, port: int, key: str, deadline_s: float) -> bool:
        """True for 200; false for an answer that says otherwise, such as 503 while loading."""
        status, _ = await self._get("/health", port, key, deadline_s)
        return status == 200

    async def read_properties(self, deployment: Launched, port: int, key: str, deadline_s: float) -> EngineProperties:
        """Raises `HelixError` (UPSTREAM_INVALID) when it does not accept the key or is no llama.cpp server."""
        status, body = await self._get("/props", port, key, deadline_s)
        if status != 200:
            raise HelixError(ErrorKind.UPSTREAM_INVALID, f"The engine answered /props with status {status}.")
        try:
            props = msgspec.json.decode(body, type=_Props)
        except msgspec.DecodeError as exc:
            raise HelixError(ErrorKind.UPSTREAM_INVALID, "The engine's /props are not those of llama.cpp.") from exc
        return EngineProperties(
            props.total_slots,
            props.default_generation_settings.n_ctx,
            props.chat_template_caps.supports_tools,
            await self._read_vocabulary(port, key, deadline_s),
        )

    async def settle(self, deployment: Launched, public_name: str, port: int, key: str, deadline_s: float) -> Settled:
        """Nothing of it changes while it runs."""
        return Settled()

    async def read_activity(self, port: int, key: str, deadline_s: float) -> int:
        """Raises `HelixError` (UPSTREAM_INVALID) when it does not list its slots."""
        status, body = await self._get("/slots", port, key, deadline_s)
        if status != 200:
            raise HelixError(ErrorKind.UPSTREAM_INVALID, f"The engine answered /slots with status {status}.")
        try:
            slots = msgspec.json.decode(body, type=list[_Slot])
        except msgspec.DecodeError as exc:
            raise HelixError(ErrorKind.UPSTREAM_INVALID, "The engine's /slots are not those of llama.cpp.") from exc
        return sum(slot.is_processing for slot in slots)

    async def _read_vocabulary(self, port: int, key: str, deadline_s: float) -> int:
        status, body = await self._get("/v1/models", port, key, deadline_s)
        if status != 200:
            return 0
        try:
            models = msgspec.json.decode(body, type=_Models).data
        except msgspec.DecodeError as exc:
            raise HelixError(ErrorKind.UPSTREAM_INVALID, "The engine's list of models is not llama.cpp's.") from exc
        return models[0].meta.n_vocab if models and models[0].meta is not None else 0

    async def _get(self, target: str, port: int, key: str, deadline_s: float) -> tuple[int, bytes]:
        origin = Origin("http", HOST, port)
        head = build_head("GET", target, origin, [("authorization", f"Bearer {key}")])
        timeouts = Timeouts(connect_s=deadline_s, first_byte_s=deadline_s, idle_s=deadline_s)
        response = await self._client.request(origin, head, b"", timeouts=timeouts)
        return response.status, await response.read_all(_MAX_BODY_BYTES)
