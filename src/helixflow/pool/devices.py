"""The GPUs of this node, by NVML. The one place that imports it, and only when a pool starts."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import structlog

from helixflow.pool.memory import Device, NoDevices

log = structlog.get_logger("helixflow.pool")


@dataclass(frozen=True, slots=True)
class DeviceProcess:
    """A process that has memory of a device; `memory_bytes` is 0 where the driver does not tell."""

    pid: int
    uuid: str
    memory_bytes: int


def open_devices(nvml: Any = None) -> "NvmlDevices | NoDevices":
    """The GPUs that the driver shows; none, and no noise, where there is no driver. Blocks while the driver wakes.

    `nvml` is the module `pynvml`, which is imported if it is not given.
    """
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return NoDevices()
    try:
        nvml.nvmlInit()
        count = nvml.nvmlDeviceGetCount()
    except nvml.NVMLError as exc:
        log.debug("devices.none", reason=str(exc))
        return NoDevices()
    return NvmlDevices(nvml) if count else NoDevices()


class NvmlDevices:
    """Implements `Devices`. What the driver cannot tell of a device counts as nothing; a device that it cannot reach
    any more is left out. All methods block for milliseconds; call them in a thread.
    """

    def __init__(self, nvml: Any) -> None:
        """`nvml` is `pynvml`, initialised."""
        self._nvml: Final = nvml
        self._failed: set[int] = set()

    def devices(self) -> tuple[Device, ...]:
        found = []
        for parent, handle in self._handles():
            device = self._describe(handle, parent)
            if device is not None:
                found.append(device)
        return tuple(found)

    def process_bytes(self, pids: Sequence[int]) -> int:
        wanted = set(pids)
        return sum(process.memory_bytes for process in self.processes() if process.pid in wanted)

    def processes(self) -> list[DeviceProcess]:
        """Everybody's. One that has memory of several devices comes once for each."""
        list_of = self._nvml.nvmlDeviceGetComputeRunningProcesses
        return [
            DeviceProcess(process.pid, uuid, process.usedGpuMemory or 0)
            for uuid, handle in self._leaves()
            for process in self._ask(partial(list_of, handle), ())
        ]

    def _handles(self) -> Iterator[tuple[str, Any]]:
        """Each GPU, and after it its MIG instances with the GPU's UUID."""
        nvml = self._nvml
        for index in range(self._ask(nvml.nvmlDeviceGetCount, 0)):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                uuid = _text(nvml.nvmlDeviceGetUUID(handle))
            except nvml.NVMLError as exc:
                if index not in self._failed:
                    self._failed.add(index)
                    log.warning("device.lost", index=index, reason=str(exc))
                continue
            self._failed.discard(index)
            yield "", handle
            for number in range(self._ask(partial(nvml.nvmlDeviceGetMaxMigDeviceCount, handle), 0)):
                instance = self._ask(partial(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, number), None)
                if instance is not None:
                    yield uuid, instance

    def _leaves(self) -> Iterator[tuple[str, Any]]:
        """What programs run on: MIG instances, and GPUs without any."""
        handles = list(self._handles())
        divided = {parent for parent, _ in handles if parent}
        for _, handle in handles:
            uuid = _text(self._ask(partial(self._nvml.nvmlDeviceGetUUID, handle), ""))
            if uuid and uuid not in divided:
                yield uuid, handle

    def _describe(self, handle: Any, parent: str) -> Device | None:
        nvml = self._nvml
        try:
            uuid, memory = _text(nvml.nvmlDeviceGetUUID(handle)), nvml.nvmlDeviceGetMemoryInfo(handle)
        except nvml.NVMLError:
            return None
        return Device(
            uuid,
            int(memory.total),
            int(memory.used),
            parent,
            _text(self._ask(partial(nvml.nvmlDeviceGetName, handle), "")),
            self._ask(lambda: int(nvml.nvmlDeviceGetUtilizationRates(handle).gpu), 0),
        )

    def _ask(self, question: Callable[[], Any], otherwise: Any) -> Any:
        """Not every device answers every question: MIG instances have no utilisation, plain GPUs no instances."""
        try:
            return question()
        except self._nvml.NVMLError:
            return otherwise


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
