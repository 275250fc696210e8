"""Checks of the machine: Python, CPU, memory, GPU."""

import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from helixflow.cli.findings import Finding
from helixflow.cli.output import format_size
from helixflow.process.cores import usable_cores

if TYPE_CHECKING:
    from helixflow.pool.plan import PlannedDeployment

_CPUINFO = Path("/proc/cpuinfo")
# What llama.cpp's kernels make use of, by the names that Linux and macOS give them.
_FEATURES = {
    "AVX": ("avx", "avx1.0"),
    "AVX2": ("avx2",),
    "FMA": ("fma",),
    "F16C": ("f16c",),
    "AVX512": ("avx512f",),
    "AVX512-VNNI": ("avx512_vnni", "avx512vnni"),
    "AMX": ("amx_int8",),
    "NEON": ("asimd", "neon", "hw.optional.arm64"),
    "DOTPROD": ("asimddp", "hw.optional.arm.feat_dotprod"),
    "SVE": ("sve",),
}
_SYSCTL_TIMEOUT_S = 5.0


def check_python() -> Finding:
    version = platform.python_version()
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding("python", "ok", f"{version} ({platform.python_implementation()})")
    return Finding("python", "problem", f"{version} is not supported", "Install Python 3.11, 3.12 or 3.13.")


def check_cpu() -> Finding:
    cores = usable_cores()
    features = known_features(_read_flags())
    machine = platform.machine()
    text = f"{cores} cores, {machine}, {', '.join(features) if features else 'no known vector features'}"
    if machine.lower() in ("x86_64", "amd64") and "AVX2" not in features:
        return Finding("cpu", "warning", text, "Without AVX2 models run several times slower; use a newer machine.")
    if cores < 2:
        return Finding("cpu", "warning", text, "Gateway and engine share one core; give the machine two or more.")
    return Finding("cpu", "ok", text)


def known_features(flags: set[str]) -> list[str]:
    """The features that matter, among the raw flags of a CPU."""
    return [name for name, spellings in _FEATURES.items() if flags.intersection(spellings)]


def check_gpu() -> Finding:
    """A machine without GPU is fine: the built-in engine runs on the CPU."""
    try:
        import pynvml
    except ImportError:
        return Finding("gpu", "ok", "none looked for: nvidia-ml-py is not installed")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return Finding("gpu", "ok", "no NVIDIA GPU or driver; models run on the CPU")
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            device = pynvml.nvmlDeviceGetHandleByIndex(index)
            name = pynvml.nvmlDeviceGetName(device)
            memory = pynvml.nvmlDeviceGetMemoryInfo(device)
            found.append(f"{name}, {format_size(int(memory.free))} of {format_size(int(memory.total))} free")
    except pynvml.NVMLError as exc:
        return Finding("gpu", "warning", f"the NVIDIA driver does not answer: {exc}", "Look at nvidia-smi.")
    finally:
        pynvml.nvmlShutdown()
    if not found:
        return Finding("gpu", "ok", "no NVIDIA GPU; models run on the CPU")
    advice = "To use it, set binary to a CUDA build of llama-server and gpu_layers = -1 on the deployment."
    return Finding("gpu", "ok", "; ".join(found), advice)


def check_memory(planned: "Sequence[PlannedDeployment]", *, running: bool) -> Finding:
    """Free RAM against what the configured models take when all are loaded. `running`: they may be loaded already."""
    import psutil

    memory = psutil.virtual_memory()
    known = [
        (one.spec.ram_bytes or one.spec.size_bytes) * one.settings.replicas if one.spec is not None else 0
        for one in planned
    ]
    needed, unknown = sum(known), sum(size == 0 for size in known)
    text = f"{format_size(memory.available)} of {format_size(memory.total)} free"
    text += f"; configured models need {format_size(needed)}" if needed else ""
    text += f" and {unknown} of unknown size" if unknown else ""
    if needed > memory.total:
        return Finding("memory", "problem", text, "Configure fewer or smaller models, or add memory.")
    if needed > memory.available and not running:
        return Finding("memory", "warning", text, "Close other programs before all models are loaded.")
    return Finding("memory", "ok", text)


def _read_flags() -> set[str]:
    if sys.platform == "darwin":
        return _flags_of_macos()
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(value.lower().split())
    return set()


def _flags_of_macos() -> set[str]:
    """Names of the machdep features, and of the optional ones that are on."""
    names = ("machdep.cpu.features", "machdep.cpu.leaf7_features", "hw.optional")
    try:
        done = subprocess.run(
            ["sysctl", *names], capture_output=True, text=True, timeout=_SYSCTL_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return set()
    flags: set[str] = set()
    for line in done.stdout.lower().splitlines():
        name, _, value = line.partition(":")
        if name.startswith("hw.optional"):
            flags.update({name.strip()} if value.strip() == "1" else ())
        else:
            flags.update(value.split())
    return flags
