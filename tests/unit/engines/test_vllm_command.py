import sys
from itertools import pairwise
from pathlib import Path

import pytest

from helixflow.core.errors import ExitCode, UserError
from helixflow.engines.launching import EngineCommand, LaunchSpec
from helixflow.engines.vllm.command import build, require_vllm
from helixflow.settings.deployments import VllmDeployment
from tests.harness.fake_vllm import write_python


def make(*, gpus: tuple[str, ...] = (), **settings: object) -> EngineCommand:
    deployment = VllmDeployment.model_validate({"engine": "vllm", "model": "org/model", **settings})
    return build(deployment, LaunchSpec(deployment, "pub", None, 1234, "s3cret", gpus))


def test_the_key_is_never_an_argument() -> None:
    command = make()
    assert "s3cret" not in " ".join(command.argv)
    assert command.env["VLLM_API_KEY"] == "s3cret"


def test_settings_become_arguments() -> None:
    argv = make(
        context=4096,
        parallel=16,
        tensor_parallel=2,
        gpu_memory_fraction=0.5,
        dtype="float16",
        python="/env/bin/python",
        extra_arguments=["--enforce-eager"],
    ).argv
    given = dict(pairwise(argv))
    expected = {
        "/env/bin/python": "-m",
        "serve": "org/model",
        "--host": "127.0.0.1",
        "--port": "1234",
        "--served-model-name": "pub",
        "--max-model-len": "4096",
        "--max-num-seqs": "16",
        "--tensor-parallel-size": "2",
        "--gpu-memory-utilization": "0.5",
        "--dtype": "float16",
    }
    assert expected.items() <= given.items()
    assert argv[-1] == "--enforce-eager"


def test_it_gets_the_gpus_that_were_assigned() -> None:
    assert make(gpus=("GPU-a", "GPU-b")).env["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"
    assert "CUDA_VISIBLE_DEVICES" not in make().env


def test_nothing_is_fetched_for_a_folder_and_nothing_is_reported(tmp_path: Path) -> None:
    assert make(model=str(tmp_path)).env["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in make().env
    assert make().env["VLLM_NO_USAGE_STATS"] == "1"


@pytest.mark.parametrize(("settings", "slots"), [({"lora": {"legal": "/l"}}, "4"), ({"max_loras": 2}, "2")])
def test_it_can_have_adapters_and_is_not_ended_by_one_that_is_broken(settings: dict[str, object], slots: str) -> None:
    command = make(**settings)
    assert {("--max-loras", slots), ("--max-lora-rank", "32")} <= set(pairwise(command.argv))
    assert "--enable-lora" in command.argv
    assert "--lora-modules" not in command.argv
    assert command.env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"


def test_without_adapters_nothing_is_set_aside_for_them() -> None:
    command = make()
    assert "--enable-lora" not in command.argv
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in command.env


def test_it_can_be_put_to_sleep_only_if_it_is_to_be() -> None:
    sleepy = make(sleep_when_idle=True)
    assert "--enable-sleep-mode" in sleepy.argv
    assert sleepy.env["VLLM_SERVER_DEV_MODE"] == "1"
    assert "VLLM_SERVER_DEV_MODE" not in make().env


def test_the_kv_cache_in_ram_is_as_large_as_said() -> None:
    assert make(cpu_kv_cache_gib=2).env["VLLM_CPU_KVCACHE_SPACE"] == "2"


def test_an_embedding_model_pools() -> None:
    assert ("--runner", "pooling") in pairwise(make(task="embeddings").argv)


def test_a_python_without_vllm_is_told_before_anything_starts(tmp_path: Path) -> None:
    def deployment(python: Path) -> VllmDeployment:
        return VllmDeployment(engine="vllm", model="m", python=python)

    with pytest.raises(UserError, match="pip install vllm") as refused:
        require_vllm("m/vllm-0", deployment(Path(sys.executable)))
    assert refused.value.exit_code == ExitCode.CONFIG
    with pytest.raises(UserError, match="cannot be run"):
        require_vllm("m/vllm-0", deployment(tmp_path / "nothing"))
    with_vllm = deployment(write_python(tmp_path))
    require_vllm("m/vllm-0", with_vllm)
