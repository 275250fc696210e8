"""The process of one replica: `python -m helixflow.engines.llama_cpp.child`, parameters as JSON on standard input.

It is started behind `process.shim`, so that it dies with the launcher even while loading, which holds the GIL from
start to end. It serves until it is killed: llama.cpp has no graceful stop. The only module that loads xllamacpp.
"""

import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from xllamacpp import CommonParams

# 0 hides why a model does not load, 3 writes lines for every request.
_VERBOSITY: Final = 1


class ChildParameters(msgspec.Struct, frozen=True, kw_only=True):
    """What the replica needs to know, in llama.cpp's terms. `context` is the KV cache of all slots together, tokens."""

    model_path: str
    port: int
    api_key: str
    alias: str
    embeddings: bool
    context: int
    parallel: int
    kv_unified: bool
    threads: int
    batch_threads: int
    batch: int
    ubatch: int
    gpu_layers: int
    flash_attention: str
    cache_type_k: str
    cache_type_v: str
    prompt_cache_mib: int
    chat_template: str = ""
    chat_template_file: str = ""
    lora: list[str] = []
    mmproj: str = ""
    draft_model: str = ""


def main() -> int:
    """Serves for ever; returns 1 if the model cannot be served (llama.cpp has written why)."""
    parameters = msgspec.json.decode(sys.stdin.buffer.read(), type=ChildParameters)
    import xllamacpp

    try:
        params = to_common_params(parameters)
        server = xllamacpp.Server(params)
    except (RuntimeError, OSError, ValueError) as exc:
        print(f" E llama.cpp does not start: {exc}", file=sys.stderr, flush=True)  # noqa: T201
        return 1
    # Held for as long as the process lives: dropping it would end the server.
    _serve_for_ever(server)
    return 0


def to_common_params(parameters: ChildParameters) -> "CommonParams":
    """The wheel's parameter object. Raises `OSError` for a chat template that cannot be read."""
    import xllamacpp as lib

    p = lib.CommonParams()
    p.model.path = parameters.model_path
    p.model_alias = {parameters.alias}
    p.port = parameters.port
    p.api_keys = [parameters.api_key]
    p.ui = False
    p.verbosity = _VERBOSITY
    p.endpoint_metrics = True
    p.endpoint_slots = True
    p.n_ctx = parameters.context
    p.n_parallel = parameters.parallel
    p.kv_unified = parameters.kv_unified
    p.n_batch = parameters.batch
    p.n_ubatch = parameters.ubatch
    p.cpuparams.n_threads = parameters.threads
    p.cpuparams_batch.n_threads = parameters.batch_threads
    p.n_gpu_layers = parameters.gpu_layers
    # The settings are what is wanted: nothing is quietly made smaller, and the model is read once, not twice.
    p.fit_params = False
    p.flash_attn_type = _flash_attention(lib, parameters.flash_attention)
    p.cache_type_k = getattr(lib.ggml_type, f"GGML_TYPE_{parameters.cache_type_k.upper()}")
    p.cache_type_v = getattr(lib.ggml_type, f"GGML_TYPE_{parameters.cache_type_v.upper()}")
    p.cache_ram_mib = parameters.prompt_cache_mib
    template = parameters.chat_template
    if parameters.chat_template_file:
        template = Path(parameters.chat_template_file).read_text(encoding="utf-8")
    if template:
        p.chat_template = template
    if parameters.lora:
        p.lora_adapters = [_lora(lib, path) for path in parameters.lora]
    if parameters.mmproj:
        p.mmproj.path = parameters.mmproj
    if parameters.draft_model:
        p.speculative.draft.mparams.path = parameters.draft_model
        p.speculative.types = [lib.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
    if parameters.embeddings:
        p.embedding = True
        p.pooling_type = lib.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    return p


def _flash_attention(lib: Any, value: str) -> Any:
    kinds = lib.llama_flash_attn_type
    return {
        "auto": kinds.LLAMA_FLASH_ATTN_TYPE_AUTO,
        "on": kinds.LLAMA_FLASH_ATTN_TYPE_ENABLED,
        "off": kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED,
    }[value]


def _lora(lib: Any, path: str) -> Any:
    adapter = lib.CommonAdapterLoraInfo()
    adapter.path = path
    adapter.scale = 1.0
    return adapter


def _serve_for_ever(server: object) -> None:
    threading.Event().wait()
    del server


if __name__ == "__main__":
    sys.exit(main())
