"""What a replica will take in memory, before it was ever seen: from the head of its model file and its settings.

Rather too much than too little: what was planned is replaced by what was measured after the first load.
"""

from pathlib import Path
from typing import Final

from helixflow.engines.llama_cpp.child import ChildParameters
from helixflow.engines.llama_cpp.command import parameters_for
from helixflow.pool.gguf_header import GgufHeader, read_gguf_header
from helixflow.pool.memory import Need
from helixflow.pool.model_folder import weights_bytes
from helixflow.settings.deployments import Launched, LlamaCppDeployment, VllmDeployment

MIB: Final = 1 << 20
# Measured: an engine of the built-in wheel takes 59 MB beside its weights and its KV cache, whatever the model.
_LLAMA_PROCESS_BYTES: Final = 64 * MIB
_VLLM_PROCESS_BYTES: Final = 2048 * MIB
# llama.cpp rounds the cells of a cache up to this.
_CELLS: Final = 256
# Bytes of 32 values.
_CACHE_BLOCKS: Final = {"f32": 128, "f16": 64, "bf16": 64, "q8_0": 34, "q4_0": 18, "q4_1": 20, "q5_0": 22, "q5_1": 24}
_MAX_LAYERS: Final = 4096
# Filled as requests come: not resident right after the load.
LATER: Final = ("prompt cache", "compute buffers")


def estimate(deployment: Launched, model_path: Path | None, *, has_gpus: bool) -> Need:
    """What one replica of `deployment` takes; `model_path` is its GGUF file, or the folder of its weights.

    Reads the heads of all its files, so it blocks. Raises `ValueError` naming the file when one cannot be used: it was
    cut short, or is none; `OSError` when one cannot be read.
    """
    if isinstance(deployment, VllmDeployment):
        return _estimate_vllm(deployment, model_path, has_gpus=has_gpus)
    assert model_path is not None
    return _estimate_llama(deployment, model_path, has_gpus=has_gpus)


def _estimate_llama(deployment: LlamaCppDeployment, model_path: Path, *, has_gpus: bool) -> Need:
    parameters = parameters_for(deployment, model_path=model_path, port=0, key="", public_name="")
    header = _header(model_path)
    weights = header.tensor_bytes
    cache = kv_cache_bytes(header, parameters)
    for text in (parameters.draft_model, parameters.mmproj, *parameters.lora):
        if not text:
            continue
        other = _header(Path(text))
        weights += other.tensor_bytes
        if text == parameters.draft_model:
            cache += kv_cache_bytes(other, parameters)
    parts = {
        "weights": weights,
        "KV cache": cache,
        "compute buffers": compute_bytes(header, parameters),
        "prompt cache": 0 if parameters.embeddings else parameters.prompt_cache_mib * MIB,
        "process": _LLAMA_PROCESS_BYTES,
    }
    layers = header.figure("block_count") + 1  # the output layer counts as one
    share = min(1.0, parameters.gpu_layers / layers) if has_gpus else 0.0
    on_gpu = int((weights + cache) * share) + (parts["compute buffers"] if share else 0)
    # Compute buffers are needed on both sides; weights on the GPU are read through the page cache and let go.
    in_ram = sum(parts.values()) - int((weights + cache) * share)
    return Need(in_ram, gpu_bytes=on_gpu, parts=parts)


def kv_cache_bytes(header: GgufHeader, parameters: ChildParameters) -> int:
    """The KV cache of all slots: cells × layers × (keys + values). Layers with a sliding window count in full.

    What recurrent layers keep instead is counted for each slot.
    """
    layers = min(header.figure("block_count"), _MAX_LAYERS)
    heads = header.figures("attention.head_count", layers)
    kv_heads = header.figures("attention.head_count_kv", layers) or heads
    embedding = header.figure("embedding_length")
    if header.metadata.get(f"{header.architecture}.attention.causal") is not False and kv_heads:
        width = embedding // max(1, max(heads, default=1))
        keys = header.figure("attention.key_length") or width
        values = header.figure("attention.value_length") or width
        block_k, block_v = _CACHE_BLOCKS[parameters.cache_type_k], _CACHE_BLOCKS[parameters.cache_type_v]
        # Without unified cache each slot has its part, rounded up.
        streams = 1 if parameters.kv_unified else parameters.parallel
        cells = _round_up(parameters.context // streams, _CELLS) * streams
        cache = cells * sum(kv_heads) * (keys * block_k + values * block_v) // 32
    else:
        cache = 0
    inner, state = header.figure("ssm.inner_size"), header.figure("ssm.state_size")
    groups, window = max(1, header.figure("ssm.group_count")), header.figure("ssm.conv_kernel")
    recurrent = (max(0, window - 1) * (inner + 2 * groups * state) + inner * state) * 4 if inner else 0
    return cache + recurrent * layers * parameters.parallel


def compute_bytes(header: GgufHeader, parameters: ChildParameters) -> int:
    """Buffers of one step: activations, the attention mask (or all scores, without flash attention), and logits."""
    embedding = header.figure("embedding_length")
    widest = max(header.figures("feed_forward_length", min(header.figure("block_count"), _MAX_LAYERS)), default=0)
    heads = max(header.figures("attention.head_count", min(header.figure("block_count"), _MAX_LAYERS)), default=1)
    scores = 2 * heads if parameters.flash_attention == "off" else 1
    a_token = 4 * (8 * embedding + 3 * widest + scores * parameters.context + header.vocabulary)
    return parameters.ubatch * a_token + 4 * header.vocabulary * parameters.parallel


def _estimate_vllm(deployment: VllmDeployment, model_path: Path | None, *, has_gpus: bool) -> Need:
    if has_gpus:
        return Need(
            _VLLM_PROCESS_BYTES * deployment.tensor_parallel,
            gpu_fraction=deployment.gpu_memory_fraction,
            gpu_count=deployment.tensor_parallel,
            gpus=deployment.gpus,
        )
    weights = weights_bytes(model_path) if model_path is not None else 0
    cache = deployment.cpu_kv_cache_gib << 30
    parts = {"weights": weights, "KV cache": cache, "process": _VLLM_PROCESS_BYTES}
    return Need(sum(parts.values()), parts=parts)


def _header(path: Path) -> GgufHeader:
    try:
        return read_gguf_header(path)
    except ValueError as exc:
        raise ValueError(f"{path.name} cannot be used: {exc}") from exc


def _round_up(value: int, grain: int) -> int:
    return -(-value // grain) * grain
