"""What can serve a model: engines that a pool runs on its node, and servers of others."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, model_validator

from helixflow.settings.section import Label, Seconds, SecretRef, Section, WebAddress

_DEFAULT_LORAS: Final = 4


class RoutedDeployment(Section):
    """What routing knows of any deployment."""

    name: Label | None = Field(
        None, description="Its name within the model, for records and metrics; default `<engine>-<position>`."
    )
    tier: int = Field(0, ge=0, le=99, description="Lower tiers are tried first; a tier shares its requests by weight.")
    weight: float = Field(1, ge=0, le=1_000_000, description="Share of its tier's requests; 0: only as a last resort.")
    region: Label | None = Field(None, description="Where it computes, such as `eu`; what `residency` is held against.")
    max_concurrency: int | None = Field(None, ge=1, description="Requests at the same time; default: no ceiling.")
    requests_per_minute: int | None = Field(None, ge=1, description="Ceiling, so that a provider's limit is kept.")
    tokens_per_minute: int | None = Field(None, ge=1, description="The same for tokens, prompt and answer.")
    probe_interval_s: float = Field(
        0, ge=0, le=86_400, description="How often it is probed while it has no traffic, seconds; 0: never."
    )


class LaunchedDeployment(RoutedDeployment):
    """What pools know of a model that they serve with processes of their own."""

    source: str | None = Field(
        None, description="Model source (`pypi:`, `hf:`, `file:`, `https:`); default: catalogue."
    )
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="Expected SHA-256 of the model file.")
    nodes: tuple[Label, ...] = Field((), description="Names of the pools that serve it (`pool.name`); default: all.")
    load: Literal["start", "first_use"] = Field("start", description="Load with the service, or on the first request.")
    keep_alive_s: float = Field(
        0, ge=0, le=30 * 86_400, description="Unloaded after so long without a request, seconds; 0: never for that."
    )
    pinned: bool = Field(False, description="Never unloaded to make room for another model.")
    context: int = Field(8192, ge=64, description="Most tokens one request may use, prompt and answer together.")
    parallel: int = Field(4, ge=1, le=256, description="Generations at the same time (slots).")
    replicas: int = Field(1, ge=1, le=64, description="Engine processes for this deployment.")
    max_queue: int = Field(512, ge=0, description="Requests that may wait for a slot.")

    @property
    def live_settings(self) -> Mapping[str, object]:
        """Settings that a running engine takes over, each with what its process depends on of it."""
        return {}


class LlamaCppDeployment(LaunchedDeployment):
    """A model served by llama.cpp in a process of its own."""

    engine: Literal["llama_cpp"] = Field(description="Which kind of engine serves it.")
    binary: Path | None = Field(None, description="A `llama-server` of your own (CUDA, ROCm, Vulkan, Metal build).")
    task: Literal["chat", "embeddings"] = Field("chat", description="What the model is for.")
    threads: int | None = Field(None, ge=1, description="Threads for decoding; default depends on the cores.")
    batch_threads: int | None = Field(None, ge=1, description="Threads for prefill; default: as `threads`.")
    # The engine drops an abandoned prompt after one to two steps. Measured with 135M parameters and 1 thread, tokens/s
    # and seconds a step: 256: 81, 3.2; 128: 79, 1.6; 64: 72, 0.9; 48: 54, 0.9; 32: 56, 0.6.
    batch_size: int = Field(64, ge=32, description="Tokens a prefill step; bounds how long it holds all slots.")
    gpu_layers: int = Field(0, ge=-1, description="Layers on the GPU; -1 for all.")
    flash_attention: Literal["auto", "on", "off"] = Field("auto", description="Flash attention.")
    cache_type_k: Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"] = Field(
        "f16", description="Type of the keys in the KV cache."
    )
    cache_type_v: Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"] = Field(
        "f16", description="Type of the values in the KV cache."
    )
    kv_unified: bool = Field(
        True,
        description="Slots share one KV cache of `context` tokens; needing more together they fail as overloaded.",
    )
    prompt_cache_mib: int = Field(256, ge=0, description="RAM for cached prompts, MiB; 0 turns it off.")
    chat_template: str | None = Field(None, description="Jinja template text that replaces the model's own.")
    chat_template_file: Path | None = Field(None, description="File of such a template.")
    lora: tuple[Path, ...] = Field((), description="LoRA adapters (GGUF) applied to the model.")
    mmproj: Path | None = Field(None, description="Multimodal projector (GGUF).")
    tokenizer: Path | None = Field(None, description="`tokenizer.json` of an embedding model outside the catalogue.")
    draft_model: Path | None = Field(None, description="Small model (GGUF) for speculative decoding.")

    @model_validator(mode="after")
    def _one_template(self) -> "LlamaCppDeployment":
        if self.chat_template is not None and self.chat_template_file is not None:
            raise ValueError("give chat_template or chat_template_file, not both")
        return self


class VllmDeployment(LaunchedDeployment):
    """A model served by `vllm serve` in a process of its own (needs vLLM, which is no dependency of ours)."""

    engine: Literal["vllm"] = Field(description="Which kind of engine serves it.")
    model: str = Field(min_length=1, description="Folder of the model (safetensors), or its name on Hugging Face.")
    python: Path | None = Field(None, description="Python of the environment that has vLLM; default: our own.")
    task: Literal["chat", "embeddings"] = Field("chat", description="What the model is for.")
    gpus: tuple[str, ...] = Field(
        (), description="UUIDs of the GPUs (or MIG devices) it may use; default: free ones are assigned."
    )
    tensor_parallel: int = Field(1, ge=1, le=64, description="GPUs that share one replica.")
    gpu_memory_fraction: float = Field(0.9, gt=0, le=1, description="Part of each GPU's memory that vLLM takes.")
    cpu_kv_cache_gib: int = Field(
        4, ge=1, le=65_536, description="RAM for the KV cache on a machine without GPUs, GiB."
    )
    dtype: str = Field("auto", pattern=r"^[a-z0-9]+$", description="Data type of weights and activations.")
    lora: dict[Label, str] = Field(
        {}, description="LoRA adapters by name, each a folder; asked for as `<model>:<name>`. Changed while it runs."
    )
    max_loras: int = Field(
        0, ge=0, le=64, description="Adapters at work at the same time; 0: 4 if `lora` has any, else none ever."
    )
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = Field(32, description="Highest rank of an adapter.")
    sleep_when_idle: bool = Field(False, description="Sleeps instead of ending when it is idle or has to make room.")
    extra_arguments: tuple[str, ...] = Field((), description="Further arguments of `vllm serve`.")

    @property
    def lora_slots(self) -> int:
        """Adapters at work at the same time; 0: its engine cannot have any."""
        return self.max_loras or (_DEFAULT_LORAS if self.lora else 0)

    @property
    def live_settings(self) -> Mapping[str, object]:
        return {"lora": self.lora_slots > 0, "max_loras": self.lora_slots}


class ProviderDeployment(RoutedDeployment):
    """A model on somebody else's server."""

    base_url: WebAddress = Field(description="Base URL, usually ending in `/v1`.")
    model: str | None = Field(None, min_length=1, description="The model's name there; default: the public name.")
    api_key_file: Path | None = Field(None, description="File that holds the API key.")
    api_key_env: str | None = Field(None, description="Environment variable that holds the API key.")
    headers: dict[str, str] = Field({}, description="Extra request headers; values may be `${ENV}`.")
    ca_file: Path | None = Field(None, description="CA certificates to trust instead of the system's.")
    connect_timeout_s: Seconds = Field(5, description="Time to open a connection.")
    first_byte_timeout_s: Seconds = Field(120, description="Time until the answer's head.")
    idle_timeout_s: Seconds = Field(60, description="Longest silence within an answer.")
    max_connections: int = Field(1024, ge=1, description="Connections open at the same time.")
    context: int = Field(
        131_072, ge=64, description="Most tokens one request may use; budgets reserve so much when it does not say."
    )

    @model_validator(mode="after")
    def _one_key(self) -> "ProviderDeployment":
        if self.api_key_file is not None and self.api_key_env is not None:
            raise ValueError("give api_key_file or api_key_env, not both")
        for name, value in self.headers.items():
            if not name.isascii() or not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"{name!r} is not a header name")
            if any(c in value for c in "\r\n\0"):
                raise ValueError(f"the header {name!r} has a line break in its value")
        return self

    @property
    def api_key(self) -> SecretRef | None:
        if self.api_key_file is None and self.api_key_env is None:
            return None
        return SecretRef(file=self.api_key_file, env=self.api_key_env)


class OpenAIDeployment(ProviderDeployment):
    """A model of any server that speaks OpenAI's API."""

    engine: Literal["openai"] = Field(description="Which kind of engine serves it.")


class AnthropicDeployment(ProviderDeployment):
    """A model of a server that speaks Anthropic's Messages API."""

    engine: Literal["anthropic"] = Field(description="Which kind of engine serves it.")
    base_url: WebAddress = Field("https://api.anthropic.com/v1", description="Base URL.")
    version: str = Field("2023-06-01", description="Sent as `anthropic-version`.", pattern=r"^[0-9a-z-]+$")
    max_tokens: int = Field(4096, ge=1, description="Longest answer when a request does not say; the API demands one.")


class OllamaDeployment(ProviderDeployment):
    """A model of an Ollama server, over its own API."""

    engine: Literal["ollama"] = Field(description="Which kind of engine serves it.")
    base_url: WebAddress = Field("http://127.0.0.1:11434", description="Base URL.")
    context: int = Field(
        8192, ge=64, description="Most tokens one request may use; Ollama loads the model with it (`num_ctx`)."
    )


Launched = LlamaCppDeployment | VllmDeployment
Provider = OpenAIDeployment | AnthropicDeployment | OllamaDeployment
Deployment = Annotated[Launched | Provider, Field(discriminator="engine")]
