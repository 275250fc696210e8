"""LoRA adapters of a running vLLM server: what it has is brought to what it is to have.

An adapter is served under `<public name>:<name>`. vLLM's cache of prompts tells adapters apart by name and folder.
"""

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

import msgspec
import structlog

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.provider_errors import read_error
from helixflow.engines.launching import Settled
from helixflow.settings.deployments import VllmDeployment

# Posts JSON to a path; returns status and answer.
Post = Callable[[str, Mapping[str, str]], Awaitable[tuple[int, bytes]]]
_MAX_REASON_CHARS: Final = 200
log = structlog.get_logger("helixflow.engines")


class _Model(msgspec.Struct):
    id: str
    root: str | None = None
    parent: str | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


def wanted_adapters(deployment: VllmDeployment, public_name: str) -> dict[str, str]:
    """Where each one is, by the name under which it is served: a folder, or a name on Hugging Face."""
    return {f"{public_name}:{name}": str(Path(path).expanduser()) for name, path in deployment.lora.items()}


def loaded_adapters(body: bytes) -> dict[str, str]:
    """The same of those that a server has, from its answer to `/v1/models`. Raises `HelixError` (UPSTREAM_INVALID)."""
    try:
        models = msgspec.json.decode(body, type=_Models).data
    except msgspec.DecodeError as exc:
        raise HelixError(ErrorKind.UPSTREAM_INVALID, "The engine's list of models is not vLLM's.") from exc
    return {model.id: model.root or "" for model in models if model.parent is not None}


async def reconcile(post: Post, wanted: Mapping[str, str], loaded: Mapping[str, str]) -> Settled:
    """Unloads what is not wanted, or is elsewhere now, and loads what is missing. Generations that run go on."""
    having = dict(loaded)
    troubles = []
    for name in [name for name, path in loaded.items() if wanted.get(name) != path]:
        if trouble := await _change(post, "unload", {"lora_name": name}):
            troubles.append(trouble)
        else:
            del having[name]
    for name, path in wanted.items():
        if name in having:
            continue
        if trouble := await _change(post, "load", {"lora_name": name, "lora_path": path}):
            troubles.append(trouble)
        else:
            having[name] = path
    right = tuple(sorted(name for name, path in having.items() if wanted.get(name) == path))
    return Settled(right, "; ".join(troubles))


async def _change(post: Post, verb: str, body: Mapping[str, str]) -> str:
    """Why it could not be done, in one line; empty when it was."""
    name = body["lora_name"]
    try:
        status, answer = await post(f"/v1/{verb}_lora_adapter", body)
    except HelixError as exc:
        reason = exc.message
    else:
        if status == 200:
            log.info(f"adapter.{verb}ed", adapter=name)
            return ""
        reason = " ".join(read_error(answer).message.split())[:_MAX_REASON_CHARS] or f"status {status}"
    return f"the adapter {name!r} could not be {verb}ed: {reason}"
