"""What replicas are planned to take, and what is remembered of them once they were measured."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helixflow.engines.llama_cpp.command import parameters_for
from helixflow.pool.catalogue import Catalogue
from helixflow.pool.gguf_header import GgufHeader
from helixflow.pool.measured import MemoryFigures, measure
from helixflow.pool.memory import Device, Need, NoDevices
from helixflow.pool.memory_estimate import compute_bytes, estimate, kv_cache_bytes
from helixflow.pool.plan import PlannedDeployment, plan_deployments
from helixflow.pool.replica import ModelFiles
from helixflow.settings.deployments import LlamaCppDeployment, VllmDeployment
from helixflow.settings.models import ModelSettings
from helixflow.settings.tree import Settings

# SmolLM2-135M-Instruct.
SMOLLM = GgufHeader(
    {
        "general.architecture": "llama",
        "llama.block_count": 30,
        "llama.embedding_length": 576,
        "llama.feed_forward_length": 1536,
        "llama.attention.head_count": 9,
        "llama.attention.head_count_kv": 3,
    },
    vocabulary=49152,
)


def cache(header: GgufHeader, **settings: Any) -> int:
    deployment = LlamaCppDeployment(engine="llama_cpp", **settings)
    return kv_cache_bytes(header, parameters_for(deployment, model_path=Path("m"), port=0, key="", public_name=""))


def test_the_kv_cache_is_what_llama_cpp_says_it_is() -> None:
    """Its log for this model: 8192 cells, 30 layers, K (f16) 90.00 MiB, V (f16) 90.00 MiB."""
    assert cache(SMOLLM, context=8192) == 180 << 20
    assert cache(SMOLLM, context=8192, kv_unified=False, parallel=4) == 4 * 180 << 20
    assert cache(SMOLLM, context=8192, cache_type_k="q8_0", cache_type_v="q4_0") == 90 * (34 + 18) * (1 << 20) // 64
    assert cache(SMOLLM, context=300) == 180 * (1 << 20) * 512 // 8192, "cells are rounded up"


def test_layers_may_have_heads_of_their_own_and_heads_a_width_of_their_own() -> None:
    metadata = {key: value for key, value in SMOLLM.metadata.items() if not key.endswith("head_count_kv")}
    metadata |= {"llama.attention.key_length": 128, "llama.attention.value_length": 64, "llama.block_count": 3}
    header = GgufHeader(metadata, {"llama.attention.head_count_kv": (4, 0, 8)})
    assert cache(header, context=256) == 256 * 12 * (128 + 64) * 2


def test_encoders_have_no_kv_cache_and_recurrent_layers_a_state_a_slot() -> None:
    encoder = replace(SMOLLM, metadata={**SMOLLM.metadata, "llama.attention.causal": False})
    assert cache(encoder, context=512) == 0
    mamba = GgufHeader(
        {
            "general.architecture": "mamba",
            "mamba.block_count": 2,
            "mamba.embedding_length": 8,
            "mamba.attention.head_count": 0,
            "mamba.ssm.inner_size": 16,
            "mamba.ssm.state_size": 4,
            "mamba.ssm.conv_kernel": 4,
        }
    )
    assert cache(mamba, parallel=3) == 3 * 2 * 4 * (3 * (16 + 2 * 4) + 16 * 4)


def test_a_longer_step_needs_larger_buffers_and_scores_cost_most() -> None:
    def compute(**settings: Any) -> int:
        deployment = LlamaCppDeployment(engine="llama_cpp", **settings)
        return compute_bytes(SMOLLM, parameters_for(deployment, model_path=Path("m"), port=0, key="", public_name=""))

    assert compute(batch_size=64) < compute(batch_size=512) < compute(batch_size=512, flash_attention="off")


def test_absurd_figures_of_a_header_are_only_numbers(tmp_path: Path) -> None:
    wild = GgufHeader(
        {
            "general.architecture": "llama",
            "llama.block_count": 1 << 63,
            "llama.embedding_length": 1 << 63,
            "llama.attention.head_count": 1,
            "llama.attention.head_count_kv": 1 << 63,
        }
    )
    assert cache(wild) > 1 << 100


def planned(path: Path, **settings: Any) -> PlannedDeployment:
    deployment = LlamaCppDeployment(engine="llama_cpp", source=f"file:{path}", **settings)
    tree = Settings(data_dir=path.parent, models=(ModelSettings(name="m", deployments=(deployment,)),))
    return plan_deployments(tree, Catalogue([]))[0]


def test_all_files_of_a_model_count(tmp_path: Path, make_gguf: Callable[..., bytes]) -> None:
    for name in ("m", "lora", "eyes", "draft"):
        (tmp_path / name).write_bytes(make_gguf(bytes(4096)))
    deployment = LlamaCppDeployment(
        engine="llama_cpp",
        lora=(tmp_path / "lora",),
        mmproj=tmp_path / "eyes",
        draft_model=tmp_path / "draft",
        prompt_cache_mib=2,
    )
    need = estimate(deployment, tmp_path / "m", has_gpus=False)
    assert (need.parts["weights"], need.parts["prompt cache"]) == (4 * 4096, 2 << 20)
    assert need.ram_bytes == sum(need.parts.values())
    (tmp_path / "eyes").write_bytes(make_gguf()[:100])
    with pytest.raises(ValueError, match="eyes cannot be used: it was cut short"):
        estimate(deployment, tmp_path / "m", has_gpus=False)


def test_layers_on_the_gpu_leave_the_ram(tmp_path: Path, make_gguf: Callable[..., bytes]) -> None:
    (tmp_path / "m").write_bytes(make_gguf(bytes(1 << 24)))
    deployment = LlamaCppDeployment(engine="llama_cpp", gpu_layers=-1)
    on_gpu = estimate(deployment, tmp_path / "m", has_gpus=True)
    in_ram = estimate(deployment, tmp_path / "m", has_gpus=False)
    assert on_gpu.gpu_bytes >= 1 << 24
    assert in_ram.gpu_bytes == 0
    assert in_ram.ram_bytes - on_gpu.ram_bytes == 1 << 24


def test_vllm_takes_its_part_of_each_gpu_or_its_weights_in_ram(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    (tmp_path / "config.json").write_text("{}")
    deployment = VllmDeployment(
        engine="vllm", model=str(tmp_path), tensor_parallel=2, gpu_memory_fraction=0.5, cpu_kv_cache_gib=3
    )
    on_gpus = estimate(deployment, tmp_path, has_gpus=True)
    assert (on_gpus.gpu_fraction, on_gpus.gpu_count) == (0.5, 2)
    in_ram = estimate(deployment, tmp_path, has_gpus=False)
    assert (in_ram.parts["weights"], in_ram.parts["KV cache"]) == (1000, 3 << 30)


def test_what_was_measured_replaces_the_plan_and_is_remembered(tmp_path: Path, make_gguf: Callable[..., bytes]) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(make_gguf())
    one, files = planned(path, prompt_cache_mib=1000), ModelFiles(path, "d" * 64)
    figures = MemoryFigures(tmp_path / "measured.json", NoDevices())
    plan = figures.need(one, files)
    own = measure(os.getpid(), NoDevices()).ram_bytes
    noted = figures.note(one, files.digest, plan, os.getpid(), fresh=True)
    assert own <= noted.ram_bytes - (1000 << 20) < own + (64 << 20), "what is filled later is still to come"
    again = MemoryFigures(tmp_path / "measured.json", NoDevices())
    assert again.need(one, files) == replace(noted, parts={})
    assert again.need(one, files).measured
    assert not again.need(one, ModelFiles(path, "e" * 64)).measured, "another model"
    assert not again.need(planned(path, parallel=2), files).measured, "other settings"
    grown = again.note(one, files.digest, Need(1, measured=True), os.getpid(), fresh=False)
    assert grown.ram_bytes == noted.ram_bytes, "it never becomes less"


def test_a_process_that_has_ended_teaches_nothing(tmp_path: Path) -> None:
    figures = MemoryFigures(tmp_path / "measured.json", NoDevices())
    need = Need(5)
    assert figures.note(planned(tmp_path / "m.gguf"), "d", need, 2**22 - 1, fresh=True) is need
    assert not (tmp_path / "measured.json").exists()


@pytest.mark.parametrize("content", [b"{", b'{"a": 1}', b"\xff"])
def test_a_damaged_file_of_figures_is_begun_anew(
    tmp_path: Path, make_gguf: Callable[..., bytes], content: bytes
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(make_gguf())
    (tmp_path / "measured.json").write_bytes(content)
    figures = MemoryFigures(tmp_path / "measured.json", NoDevices())
    need = figures.need(planned(path), ModelFiles(path, "d"))
    assert not need.measured
    figures.note(planned(path), "d", need, os.getpid(), fresh=True)
    assert MemoryFigures(tmp_path / "measured.json", NoDevices()).need(planned(path), ModelFiles(path, "d")).measured


class OneGpu:
    """A device with a process on it."""

    def devices(self) -> tuple[Device, ...]:
        return (Device("g0", 1 << 30),)

    def process_bytes(self, pids: Any) -> int:
        return 777 if os.getpid() in pids else 0


def test_gpu_memory_is_measured_too(tmp_path: Path, make_gguf: Callable[..., bytes]) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(make_gguf())
    one, files = planned(path, gpu_layers=-1), ModelFiles(path, "d")
    figures = MemoryFigures(tmp_path / "measured.json", OneGpu())
    noted = figures.note(one, "d", figures.need(one, files), os.getpid(), fresh=True)
    assert noted.gpu_bytes == figures.need(one, files).gpu_bytes == 777
