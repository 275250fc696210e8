"""What replicas take in memory: planned before they were ever loaded, measured afterwards, and remembered."""

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec
import psutil
import structlog

from helixflow.pool.memory import Devices, Need
from helixflow.pool.memory_estimate import LATER, estimate
from helixflow.pool.plan import PlannedDeployment
from helixflow.pool.replica import ModelFiles

# The least lately used go first.
_MAX_FIGURES: Final = 1000
log = structlog.get_logger("helixflow.pool")


class _Figure(msgspec.Struct, frozen=True):
    ram_bytes: int
    gpu_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process and all its descendants have: resident memory, and memory of GPUs."""

    ram_bytes: int
    gpu_bytes: int = 0


class MemoryFigures:
    """What each kind of replica needs. A figure once measured replaces the plan, and only ever grows.

    All methods block for milliseconds, call them in threads. `path` is where figures are kept:
    a file that cannot be read is begun anew, one that cannot be written is warned of.
    """

    def __init__(self, path: Path, devices: Devices) -> None:
        self._path = path
        self._devices = devices
        self._figures: dict[str, _Figure] | None = None
        self._lock = threading.Lock()

    def need(self, planned: PlannedDeployment, files: ModelFiles) -> Need:
        """Of one replica.

        Raises `ValueError` or `OSError` when its files cannot be used, see `estimate`.
        """
        need = estimate(planned.settings, files.path, has_gpus=bool(self._devices.devices()))
        with self._lock:
            figure = self._load().get(_key(planned, files.digest))
        if figure is None:
            return need
        gpu_bytes = figure.gpu_bytes if need.gpu_bytes else 0
        return replace(need, ram_bytes=figure.ram_bytes, gpu_bytes=gpu_bytes, measured=True, parts={})

    def note(self, planned: PlannedDeployment, digest: str, need: Need, pid: int, *, fresh: bool) -> Need:
        """Measures a replica and remembers it; returns what is to be reckoned with from now on.

        `fresh`: it was loaded just now, and will still fill its prompt cache and its buffers.
        """
        usage = measure(pid, self._devices)
        if not usage.ram_bytes:
            return need  # it has ended meanwhile
        later = sum(need.parts.get(part, 0) for part in LATER) if fresh and not need.measured else 0
        key = _key(planned, digest)
        with self._lock:
            figures = self._load()
            before = figures.pop(key, _Figure(0))
            gpu_bytes = max(before.gpu_bytes, usage.gpu_bytes) if need.gpu_bytes else 0
            now = figures[key] = _Figure(max(before.ram_bytes, usage.ram_bytes + later), gpu_bytes)
            if now != before:
                self._save()
        return replace(
            need, ram_bytes=now.ram_bytes, gpu_bytes=now.gpu_bytes or need.gpu_bytes, measured=True, parts={}
        )

    def _load(self) -> dict[str, _Figure]:
        if self._figures is None:
            try:
                self._figures = msgspec.json.decode(self._path.read_bytes(), type=dict[str, _Figure])
            except FileNotFoundError:
                self._figures = {}
            except (OSError, msgspec.DecodeError) as exc:
                log.warning("measurements.unreadable", path=str(self._path), reason=str(exc))
                self._figures = {}
        return self._figures

    def _save(self) -> None:
        figures = self._load()
        while len(figures) > _MAX_FIGURES:
            del figures[next(iter(figures))]
        # Nobody else writes it; one name, so that a crash leaves nothing that piles up.
        temporary = self._path.with_name(f".{self._path.name}.new")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(figures), indent=2) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
        except OSError as exc:
            log.warning("measurements.unwritable", path=str(self._path), reason=str(exc))


def measure(pid: int, devices: Devices) -> Usage:
    """Zero for a process that has ended.

    Resident memory, not the proportional share: what is shared with another replica of the same file today is this
    one's alone tomorrow (seen: 106 MB against 168 MB while two processes mapped the same model).
    """
    total, pids = 0, []
    for process in _tree(pid):
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue  # ended meanwhile
        pids.append(process.pid)
    return Usage(total, devices.process_bytes(pids) if pids else 0)


def _tree(pid: int) -> Sequence[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


def _key(planned: PlannedDeployment, digest: str) -> str:
    return f"{digest}:{planned.fingerprint}"


class NoFigures:
    """Nothing is known and nothing counts: every replica fits."""

    def need(self, planned: PlannedDeployment, files: ModelFiles) -> Need:
        return Need(0)

    def note(self, planned: PlannedDeployment, digest: str, need: Need, pid: int, *, fresh: bool) -> Need:
        return need
