"""How to start llama.cpp for a deployment: the built-in wheel, or a `llama-server` of the user's own."""

import sys
from pathlib import Path
from typing import Final

import msgspec

from helixflow.engines.launching import HOST, EngineCommand
from helixflow.engines.llama_cpp.child import ChildParameters
from helixflow.process.cores import usable_cores
from helixflow.settings.deployments import LlamaCppDeployment

_ALL_LAYERS: Final = 9999
_PREFILL_UBATCH: Final = 512


def build(deployment: LlamaCppDeployment, *, model_path: Path, port: int, key: str, public_name: str) -> EngineCommand:
    """The command of one replica that listens on loopback `port` and wants `key` as a bearer token."""
    parameters = parameters_for(deployment, model_path=model_path, port=port, key=key, public_name=public_name)
    if deployment.binary is None:
        return EngineCommand(
            argv=(sys.executable, "-P", "-m", "helixflow.engines.llama_cpp.child"),
            stdin=msgspec.json.encode(parameters).decode(),
        )
    return EngineCommand(
        argv=(str(deployment.binary.expanduser()), *_flags(parameters)),
        env={"LLAMA_API_KEY": key},
    )


def default_threads(cores: int | None = None) -> int:
    """Threads for decoding on a machine with `cores` logical cores (default: those this process may use).

    One core is left to the gateway. llama.cpp's threads spin while they wait for each other, so a thread too many does
    not slow it a little but stops it: on two cores, one of them busy, 2 threads made 2 to 8 tokens/s, 1 thread 33 to 39
    (135M parameters, 1 and 4 streams); with both cores free it was 31 to 66 against 24 to 35.
    """
    cores = cores if cores is not None else usable_cores()
    return max(1, cores - 1)


def parameters_for(
    deployment: LlamaCppDeployment, *, model_path: Path, port: int, key: str, public_name: str
) -> ChildParameters:
    """The deployment's settings in llama.cpp's terms.

    A unified KV cache of `context` tokens is shared by the slots; otherwise llama.cpp divides the whole by the slots.
    An embedding model reads its whole input in one batch, since attention is not causal.
    """
    embeddings = deployment.task == "embeddings"
    unified = deployment.kv_unified and not embeddings
    threads = deployment.threads or default_threads()
    batch = deployment.context if embeddings else min(deployment.batch_size, deployment.context)
    template = deployment.chat_template_file.expanduser() if deployment.chat_template_file else None
    return ChildParameters(
        model_path=str(model_path),
        port=port,
        api_key=key,
        alias=public_name,
        embeddings=embeddings,
        context=deployment.context if unified else deployment.context * deployment.parallel,
        parallel=deployment.parallel,
        kv_unified=unified,
        threads=threads,
        batch_threads=deployment.batch_threads or threads,
        batch=batch,
        ubatch=batch if embeddings else min(batch, _PREFILL_UBATCH),
        gpu_layers=_ALL_LAYERS if deployment.gpu_layers == -1 else deployment.gpu_layers,
        flash_attention=deployment.flash_attention,
        cache_type_k=deployment.cache_type_k,
        cache_type_v=deployment.cache_type_v,
        prompt_cache_mib=deployment.prompt_cache_mib,
        chat_template=deployment.chat_template or "",
        chat_template_file=str(template or ""),
        lora=[str(path.expanduser()) for path in deployment.lora],
        mmproj=str(deployment.mmproj.expanduser()) if deployment.mmproj else "",
        draft_model=str(deployment.draft_model.expanduser()) if deployment.draft_model else "",
    )


def _flags(parameters: ChildParameters) -> list[str]:
    """The same parameters as flags of `llama-server`."""
    flags = {
        "--model": parameters.model_path,
        "--host": HOST,
        "--port": parameters.port,
        "--alias": parameters.alias,
        "--ctx-size": parameters.context,
        "--parallel": parameters.parallel,
        "--threads": parameters.threads,
        "--threads-batch": parameters.batch_threads,
        "--batch-size": parameters.batch,
        "--ubatch-size": parameters.ubatch,
        "--n-gpu-layers": parameters.gpu_layers,
        "--flash-attn": parameters.flash_attention,
        "--cache-type-k": parameters.cache_type_k,
        "--cache-type-v": parameters.cache_type_v,
        "--cache-ram": parameters.prompt_cache_mib,
    }
    argv = [part for name, value in flags.items() for part in (name, str(value))]
    argv += ["--jinja", "--metrics", "--slots", "--no-webui"]
    if parameters.kv_unified:
        argv.append("--kv-unified")
    if parameters.embeddings:
        argv += ["--embedding", "--pooling", "mean"]
    for name, value in (
        ("--chat-template", parameters.chat_template),
        ("--chat-template-file", parameters.chat_template_file),
        ("--mmproj", parameters.mmproj),
        ("--model-draft", parameters.draft_model),
    ):
        argv += [name, value] if value else []
    for path in parameters.lora:
        argv += ["--lora", path]
    return argv
