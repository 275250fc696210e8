from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from helixflow.engines.launching import EngineCommand
from helixflow.engines.llama_cpp.child import ChildParameters
from helixflow.engines.llama_cpp.command import build, default_threads
from helixflow.settings.deployments import LlamaCppDeployment


def make(**settings: object) -> EngineCommand:
    deployment = LlamaCppDeployment.model_validate({"engine": "llama_cpp", **settings})
    return build(deployment, model_path=Path("/m.gguf"), port=1234, key="s3cret", public_name="pub")


def parameters(**settings: object) -> ChildParameters:
    return msgspec.json.decode(make(**settings).stdin, type=ChildParameters)


def test_the_key_is_never_an_argument() -> None:
    for command in (make(), make(binary="/bin/llama-server")):
        assert "s3cret" not in " ".join(command.argv)
        assert "s3cret" in command.stdin + str(command.env)


def test_a_unified_cache_is_shared_and_a_split_one_is_multiplied() -> None:
    assert parameters(context=1000, parallel=4).context == 1000
    assert parameters(context=1000, parallel=4, kv_unified=False).context == 4000


def test_an_embedding_model_takes_its_input_in_one_batch() -> None:
    given = parameters(task="embeddings", context=512, parallel=2, batch_size=64)
    assert (given.embeddings, given.batch, given.ubatch, given.context) == (True, 512, 512, 1024)


def test_a_step_of_prefill_never_exceeds_the_batch() -> None:
    given = parameters(batch_size=256)
    assert given.ubatch <= given.batch == 256


def test_a_binary_gets_flags() -> None:
    argv = make(
        binary="/opt/llama-server",
        gpu_layers=-1,
        chat_template_file="/t.jinja",
        lora=["/a.gguf", "/b.gguf"],
        mmproj="/p.gguf",
        draft_model="/d.gguf",
        threads=3,
    ).argv
    assert argv[0] == "/opt/llama-server"
    flags = dict(pairwise(argv))
    expected = {
        "--model": "/m.gguf",
        "--port": "1234",
        "--alias": "pub",
        "--threads": "3",
        "--threads-batch": "3",
        "--chat-template-file": "/t.jinja",
        "--mmproj": "/p.gguf",
        "--model-draft": "/d.gguf",
    }
    assert {name: flags[name] for name in expected} == expected
    assert int(flags["--n-gpu-layers"]) >= 999
    assert argv.count("--lora") == 2
    assert {"--kv-unified", "--jinja", "--metrics", "--slots"} <= set(argv)
    assert "--embedding" not in argv


def test_an_embedding_binary_pools_by_mean() -> None:
    argv = make(binary="/opt/llama-server", task="embeddings", context=512).argv
    assert argv[argv.index("--pooling") + 1] == "mean"
    assert "--kv-unified" not in argv


@pytest.mark.parametrize("cores", [1, 2, 3, 4, 64])
def test_default_threads_never_exceed_the_cores(cores: int) -> None:
    assert default_threads(cores) == max(1, cores - 1)
