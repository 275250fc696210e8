"""Memory as the pool reckons with it: what a replica needs, what there is, and who may take how much of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Protocol

import psutil

from helixflow.settings.serving import PoolSettings

_CGROUP: Final = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, or a MIG instance of one (`parent` is then the UUID of its GPU). `used_bytes` counts everybody's."""

    uuid: str
    memory_bytes: int
    used_bytes: int = 0
    parent: str = ""
    name: str = ""
    utilisation_percent: int = 0


class Devices(Protocol):
    """The GPUs of this node."""

    def devices(self) -> tuple[Device, ...]:
        """As they are now. Blocks for milliseconds; call it in a thread."""
        ...

    def process_bytes(self, pids: Sequence[int]) -> int:
        """GPU memory that these processes have now, on all devices; 0 when that cannot be told."""
        ...


class NoDevices:
    """A node without GPUs."""

    def devices(self) -> tuple[Device, ...]:
        return ()

    def process_bytes(self, pids: Sequence[int]) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class Need:
    """What one replica takes: `ram_bytes`, and on GPUs `gpu_bytes` in all, spread evenly, or `gpu_fraction` of each.

    `gpu_count` is how many it takes (0: as few as suffice), `gpus` the only ones it may have (empty: any). `measured`
    says that it was seen to take so much; `parts` names what a planned figure is made of.
    """

    ram_bytes: int
    gpu_bytes: int = 0
    gpu_fraction: float = 0.0
    gpu_count: int = 0
    gpus: tuple[str, ...] = ()
    measured: bool = False
    parts: Mapping[str, int] = field(default_factory=dict)

    @property
    def wants_gpu(self) -> bool:
        return self.gpu_bytes > 0 or self.gpu_fraction > 0


@dataclass(frozen=True, slots=True)
class Limits:
    """What engines may take in all: RAM, and of each GPU by UUID (`gpu_sizes`: their whole memory)."""

    ram_bytes: int
    gpus: Mapping[str, int] = field(default_factory=dict)
    gpu_sizes: Mapping[str, int] = field(default_factory=dict)


def ram_limit(memory_bytes: int, memory_percent: int, cgroup: Path = _CGROUP) -> int:
    """The RAM that engines may take: `memory_bytes`, or if that is 0 `memory_percent` of what this machine has, or of
    what its control group may have.
    """
    if memory_bytes:
        return memory_bytes
    physical: int = psutil.virtual_memory().total
    limit = cgroup_limit(cgroup)
    return (physical if limit is None else min(physical, limit)) * memory_percent // 100


def cgroup_limit(cgroup: Path = _CGROUP) -> int | None:
    """Bytes that our control group may have; None without a limit. Version 2 (`memory.max`) or 1.

    A group's own limit and not those of the groups above it, which a container does not see.
    """
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            return int((cgroup / name).read_text())
        except (OSError, ValueError):
            continue  # no such file, or "max"
    return None


def read_limits(settings: PoolSettings, devices: Devices, ours: Mapping[str, int]) -> Limits:
    """What engines may take on this node now; `ours` as for `gpu_limits`. Blocks."""
    gpus = gpu_limits(devices.devices(), settings.gpu_memory_percent, ours)
    return replace(gpus, ram_bytes=ram_limit(settings.memory_bytes, settings.memory_percent))


def gpu_limits(devices: Sequence[Device], percent: int, ours: Mapping[str, int]) -> Limits:
    """The GPU part of `Limits`: `percent` of each, less what others than us have there.

    `ours` is what our engines were given, by UUID. A GPU that is divided into MIG instances cannot be had as a whole.
    """
    divided = {device.parent for device in devices if device.parent}
    free = {}
    for device in devices:
        if device.uuid in divided:
            continue
        foreign = max(0, device.used_bytes - ours.get(device.uuid, 0))
        free[device.uuid] = max(0, min(device.memory_bytes * percent // 100, device.memory_bytes - foreign))
    return Limits(0, free, {device.uuid: device.memory_bytes for device in devices if device.uuid in free})
