"""What an engine kind that runs as a process of ours tells the pool: how it is started, and what ready means.

The pool starts, watches and restarts; it knows no kind by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

from helixflow.settings.deployments import Launched

HOST: Final = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class EngineCommand:
    """What the launcher starts. The engine's key travels in `env` or `stdin`, never in `argv`: that is public."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    stdin: str = ""


@dataclass(frozen=True, slots=True)
class LaunchSpec:
    """One replica that is to be started. `model_path` is None where the engine finds its model itself; `gpus` are the
    UUIDs that are assigned to it, empty for none.
    """

    deployment: Launched
    public_name: str
    model_path: Path | None
    port: int
    key: str
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineProperties:
    """What an engine says of itself: slots, tokens a request may use, whether its chat template knows tools, and the
    number of token ids (0 when it does not say).
    """

    slots: int
    context: int
    supports_tools: bool
    vocabulary: int = 0


@dataclass(frozen=True, slots=True)
class Settled:
    """What an engine was brought to: the `adapters` that it has, and what it could not be brought to, in one line."""

    adapters: tuple[str, ...] = ()
    trouble: str = ""


class EngineKind(Protocol):
    """One kind, as the pool uses it. Raises `HelixError` when an engine does not answer within `deadline_s`."""

    def command(self, spec: LaunchSpec) -> EngineCommand: ...

    async def is_healthy(self, port: int, key: str, deadline_s: float) -> bool:
        """True once it serves; false for an answer that says otherwise, such as 503 while loading."""
        ...

    async def read_properties(self, deployment: Launched, port: int, key: str, deadline_s: float) -> EngineProperties:
        """Of an engine that is healthy."""
        ...

    async def settle(self, deployment: Launched, public_name: str, port: int, key: str, deadline_s: float) -> Settled:
        """Brings an engine that is healthy to those settings that may change while it runs. Idempotent; `deadline_s`
        is for each of its steps. Trouble is told, not raised, where the engine can serve nevertheless.
        """
        ...

    async def read_activity(self, port: int, key: str, deadline_s: float) -> int:
        """Generations that run or wait in it now."""
        ...


@runtime_checkable
class SleepingKind(EngineKind, Protocol):
    """One whose engines can give their memory of GPUs away and take it again. Raises as `EngineKind`."""

    def can_sleep(self, deployment: Launched) -> bool: ...

    async def sleep(self, port: int, key: str) -> None:
        """Returns when it sleeps: its weights are in RAM, and generations that ran have ended."""
        ...

    async def wake(self, port: int, key: str) -> None:
        """Returns when it serves."""
        ...

    async def is_asleep(self, port: int, key: str, deadline_s: float) -> bool: ...
