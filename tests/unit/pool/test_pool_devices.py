"""The inventory of GPUs over a driver that is made up: two GPUs, one of them divided into two instances."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from helixflow.pool.devices import DeviceProcess, NvmlDevices, open_devices
from helixflow.pool.memory import NoDevices, gpu_limits

GIB = 1 << 30


@dataclass
class Gpu:
    uuid: str
    total: int = 80 * GIB
    used: int = GIB
    percent: int | None = 30
    instances: "list[Gpu | None]" = field(default_factory=list)
    processes: list[Any] = field(default_factory=list)
    lost: bool = False


@dataclass
class Figures:
    """Whatever NVML answers with: all of its fields in one."""

    total: int = 0
    used: int = 0
    gpu: int = 0
    pid: int = 0
    usedGpuMemory: int | None = None


class FakeNvml:
    """As much of `pynvml` as is used."""

    class NVMLError(Exception):
        pass

    def __init__(self, *gpus: Gpu, has_driver: bool = True) -> None:
        self.gpus = gpus
        self.has_driver = has_driver

    def nvmlInit(self) -> None:
        if not self.has_driver:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:
        if self.gpus[index].lost:
            raise self.NVMLError("GPU is lost")
        return self.gpus[index]

    def nvmlDeviceGetUUID(self, gpu: Gpu) -> str:
        return gpu.uuid

    def nvmlDeviceGetName(self, gpu: Gpu) -> bytes:
        return b"NVIDIA H100"

    def nvmlDeviceGetMemoryInfo(self, gpu: Gpu) -> Figures:
        return Figures(total=gpu.total, used=gpu.used)

    def nvmlDeviceGetUtilizationRates(self, gpu: Gpu) -> Figures:
        if gpu.percent is None:
            raise self.NVMLError("Not Supported")
        return Figures(gpu=gpu.percent)

    def nvmlDeviceGetMaxMigDeviceCount(self, gpu: Gpu) -> int:
        if not gpu.instances:
            raise self.NVMLError("Not Supported")
        return len(gpu.instances)

    def nvmlDeviceGetMigDeviceHandleByIndex(self, gpu: Gpu, number: int) -> Gpu:
        instance = gpu.instances[number]
        if instance is None:
            raise self.NVMLError("Not Found")
        return instance

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: Gpu) -> list[Any]:
        return gpu.processes


def made_up() -> tuple[Gpu, Gpu]:
    whole = Gpu("GPU-1", used=3 * GIB, processes=[Figures(pid=10, usedGpuMemory=2 * GIB), Figures(pid=11)])
    slices: list[Gpu | None] = [
        Gpu("MIG-a", total=10 * GIB, percent=None, processes=[Figures(pid=10, usedGpuMemory=GIB)]),
        None,
        Gpu("MIG-b", total=20 * GIB, percent=None),
    ]
    return whole, Gpu("GPU-2", instances=slices, processes=[Figures(pid=10, usedGpuMemory=GIB)])


def opened(*gpus: Gpu) -> NvmlDevices:
    devices = open_devices(FakeNvml(*gpus))
    assert isinstance(devices, NvmlDevices)
    return devices


def test_gpus_and_their_instances_are_listed() -> None:
    found = opened(*made_up()).devices()
    assert [(one.uuid, one.parent) for one in found] == [
        ("GPU-1", ""),
        ("GPU-2", ""),
        ("MIG-a", "GPU-2"),
        ("MIG-b", "GPU-2"),
    ]
    first, instance = found[0], found[2]
    assert (first.name, first.memory_bytes, first.used_bytes) == ("NVIDIA H100", 80 * GIB, 3 * GIB)
    assert (first.utilisation_percent, instance.utilisation_percent) == (30, 0)


def test_a_divided_gpu_is_assigned_by_its_instances() -> None:
    limits = gpu_limits(opened(*made_up()).devices(), 100, {})
    assert set(limits.gpus) == {"GPU-1", "MIG-a", "MIG-b"}


def test_memory_of_processes_is_counted_once_on_divided_gpus() -> None:
    devices = opened(*made_up())
    assert DeviceProcess(11, "GPU-1", 0) in devices.processes()
    assert devices.process_bytes([10]) == 3 * GIB
    assert devices.process_bytes([11, 12]) == 0


def test_a_gpu_that_is_lost_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    whole, divided = made_up()
    devices = opened(whole, divided)
    divided.lost = True
    assert [one.uuid for one in devices.devices()] == ["GPU-1"]
    assert [one.uuid for one in devices.devices()] == ["GPU-1"]
    divided.lost = False
    assert len(devices.devices()) == 4


def test_without_driver_or_gpu_there_is_nothing() -> None:
    for nvml in (FakeNvml(has_driver=False), FakeNvml()):
        assert isinstance(open_devices(nvml), NoDevices)
