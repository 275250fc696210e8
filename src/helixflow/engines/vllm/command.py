"""How to start vLLM for a deployment, and whether its environment has it."""

import subprocess
import sys
from pathlib import Path
from typing import Final

from helixflow.core.errors import ExitCode, UserError
from helixflow.engines.launching import HOST, EngineCommand, LaunchSpec
from helixflow.process.family import command as with_family
from helixflow.settings.deployments import VllmDeployment

_CHECK_TIMEOUT_S: Final = 30.0
# Looked for, not imported: that takes seconds.
_LOOK: Final = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"


def build(deployment: VllmDeployment, spec: LaunchSpec) -> EngineCommand:
    """The command of one replica. The processes that vLLM starts of its own end with it, see `process.family`."""
    folder = Path(deployment.model).expanduser()
    is_folder = folder.is_dir()
    options = {
        "--host": HOST,
        "--port": spec.port,
        "--served-model-name": spec.public_name,
        "--max-model-len": deployment.context,
        "--max-num-seqs": deployment.parallel,
        "--tensor-parallel-size": deployment.tensor_parallel,
        "--gpu-memory-utilization": deployment.gpu_memory_fraction,
        "--dtype": deployment.dtype,
    }
    flags = ["--enable-prompt-tokens-details", "--disable-uvicorn-access-log"]
    if deployment.task == "embeddings":
        flags += ["--runner", "pooling"]
    if deployment.lora_slots:
        # Which ones it is told once it serves: one that is named here and cannot be read would end it.
        options |= {"--max-loras": deployment.lora_slots, "--max-lora-rank": deployment.max_lora_rank}
        flags.append("--enable-lora")
    if deployment.sleep_when_idle:
        flags.append("--enable-sleep-mode")
    argv = [
        *(
            interpreter(deployment),
            "-m",
            "vllm.entrypoints.cli.main",
            "serve",
            str(folder) if is_folder else deployment.model,
        ),
        *(part for name, value in options.items() for part in (name, str(value))),
        *flags,
        *deployment.extra_arguments,
    ]
    env = {
        "VLLM_API_KEY": spec.key,
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "PYTHONSAFEPATH": "1",
        # Fetched is only what the settings name as being elsewhere.
        **({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"} if is_folder else {}),
        # Heard without GPUs alone. Without it vLLM takes `gpu_memory_fraction` of the whole RAM.
        "VLLM_CPU_KVCACHE_SPACE": str(deployment.cpu_kv_cache_gib),
        **({"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if deployment.lora_slots else {}),
        # Without it there is nothing that could be asked to sleep.
        **({"VLLM_SERVER_DEV_MODE": "1"} if deployment.sleep_when_idle else {}),
        **({"CUDA_VISIBLE_DEVICES": ",".join(spec.gpus)} if spec.gpus else {}),
    }
    return EngineCommand(tuple(with_family(argv)), env)


def interpreter(deployment: VllmDeployment) -> str:
    """The Python that is to run vLLM."""
    return str(deployment.python.expanduser()) if deployment.python is not None else sys.executable


def require_vllm(name: str, deployment: VllmDeployment) -> None:
    """Raises `UserError` (CONFIG) when the deployment's Python has no vLLM. Blocks while a Python starts.

    `name` is the deployment's.
    """
    python = interpreter(deployment)
    try:
        found = subprocess.run(
            [python, "-c", _LOOK], stdin=subprocess.DEVNULL, capture_output=True, timeout=_CHECK_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise UserError(f"{name}: python {python} cannot be run", ExitCode.CONFIG) from exc
    if found.returncode != 0:
        raise UserError(
            f"{name}: {python} has no vLLM; install it there (pip install vllm), or name the Python of an environment "
            "that has it with python = …",
            ExitCode.CONFIG,
        )
