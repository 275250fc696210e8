from pathlib import Path
from typing import Any

import pytest

from helixflow.core.errors import ExitCode, UserError
from helixflow.pool.catalogue import Catalogue, ModelSpec
from helixflow.pool.plan import fill_from_catalogue, plan_deployments, pool_name
from helixflow.pool.store import ModelStore
from helixflow.settings.deployments import LlamaCppDeployment, OpenAIDeployment, VllmDeployment
from helixflow.settings.models import ModelSettings
from helixflow.settings.serving import PoolSettings
from helixflow.settings.tree import Settings

CATALOGUE = Catalogue(
    [
        ModelSpec("tiny-chat", "file:/m/chat.gguf", "chat", sha256="a" * 64, context=2048),
        ModelSpec("tiny-embed", "file:/m/embed.gguf", "embeddings", sha256="b" * 64, context=512),
    ]
)


def settings(*models: ModelSettings) -> Settings:
    return Settings(data_dir=Path("/nowhere"), models=models)


def test_models_without_deployments_come_from_the_catalogue() -> None:
    filled = fill_from_catalogue(settings(ModelSettings(name="tiny-chat"), ModelSettings(name="tiny-embed")), CATALOGUE)
    chat, embed = (model.deployments[0] for model in filled.models)
    assert isinstance(chat, LlamaCppDeployment)
    assert isinstance(embed, LlamaCppDeployment)
    assert (chat.task, chat.load, chat.context, chat.source) == ("chat", "start", 2048, "file:/m/chat.gguf")
    assert (embed.task, embed.load, embed.context) == ("embeddings", "first_use", 512)


def test_filling_twice_changes_nothing_and_survives_json() -> None:
    filled = fill_from_catalogue(settings(ModelSettings(name="tiny-embed")), CATALOGUE)
    assert fill_from_catalogue(filled, CATALOGUE) == filled
    assert Settings.model_validate_json(filled.model_dump_json()) == filled


def test_an_unknown_name_says_what_was_meant() -> None:
    with pytest.raises(UserError, match="did you mean tiny-chat") as caught:
        fill_from_catalogue(settings(ModelSettings(name="tiny-chta")), CATALOGUE)
    assert caught.value.exit_code is ExitCode.CONFIG


def test_a_deployment_without_source_takes_the_catalogues_but_keeps_its_own_settings() -> None:
    own = LlamaCppDeployment(engine="llama_cpp", parallel=2, context=1024)
    filled = fill_from_catalogue(settings(ModelSettings(name="tiny-chat", deployments=(own,))), CATALOGUE)
    deployment = filled.models[0].deployments[0]
    assert isinstance(deployment, LlamaCppDeployment)
    assert (deployment.source, deployment.parallel, deployment.context) == ("file:/m/chat.gguf", 2, 1024)


def test_names_count_all_deployments_of_a_model() -> None:
    remote = OpenAIDeployment(engine="openai", base_url="http://127.0.0.1:1/v1")
    local = LlamaCppDeployment(engine="llama_cpp", source="file:/m/chat.gguf")
    model = ModelSettings(name="mixed", deployments=(remote, local))
    (planned,) = plan_deployments(settings(model), CATALOGUE)
    assert (planned.name, planned.public_name) == ("mixed/llama_cpp-1", "mixed")
    assert planned.spec.sha256 == "a" * 64


def fingerprint(**options: Any) -> str:
    deployment = LlamaCppDeployment(engine="llama_cpp", **options)
    filled = fill_from_catalogue(settings(ModelSettings(name="tiny-chat", deployments=(deployment,))), CATALOGUE)
    return plan_deployments(filled, CATALOGUE)[0].fingerprint


@pytest.mark.parametrize(
    "options",
    [
        {"replicas": 3},
        {"keep_alive_s": 60},
        {"pinned": True},
        {"max_queue": 1},
        {"load": "first_use"},
        {"name": "other", "tier": 2, "weight": 0.5, "region": "eu"},
        {"max_concurrency": 1, "requests_per_minute": 1, "tokens_per_minute": 1, "probe_interval_s": 1},
    ],
)
def test_what_engines_do_not_depend_on_leaves_the_fingerprint_alone(options: dict[str, Any]) -> None:
    assert fingerprint(**options) == fingerprint()


@pytest.mark.parametrize(
    "options",
    [
        {"parallel": 3},
        {"context": 512},
        {"threads": 7},
        {"chat_template": "x"},
        {"prompt_cache_mib": 1},
        {"source": "file:/m/other.gguf"},
    ],
)
def test_what_engines_depend_on_changes_the_fingerprint(options: dict[str, Any]) -> None:
    assert fingerprint(**options) != fingerprint()


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ({"lora": {"a": "/a"}}, {"lora": {"a": "/b", "c": "/c"}}, True),
        ({"lora": {"a": "/a"}}, {"max_loras": 4}, True),
        ({}, {"lora": {"a": "/a"}}, False),
        ({"lora": {"a": "/a"}}, {"lora": {"a": "/a"}, "max_loras": 5}, False),
        ({"lora": {"a": "/a"}}, {"lora": {"a": "/a"}, "max_lora_rank": 64}, False),
    ],
)
def test_adapters_change_while_an_engine_runs(before: dict[str, Any], after: dict[str, Any], same: bool) -> None:
    def planned(options: dict[str, Any]) -> str:
        deployment = VllmDeployment(engine="vllm", model="m", **options)
        tree = settings(ModelSettings(name="m", deployments=(deployment,)))
        return plan_deployments(tree, CATALOGUE)[0].fingerprint

    assert (planned(before) == planned(after)) is same


def test_a_node_runs_what_is_for_all_and_what_names_it() -> None:
    local = [LlamaCppDeployment(engine="llama_cpp", nodes=nodes) for nodes in ((), ("n1", "n2"), ("n2",))]
    tree = fill_from_catalogue(settings(ModelSettings(name="tiny-chat", deployments=tuple(local))), CATALOGUE)

    def names(node: str | None) -> list[str]:
        named = tree.model_copy(update={"pool": PoolSettings(name=node)})
        return [one.name.rpartition("-")[2] for one in plan_deployments(named, CATALOGUE)]

    assert names("n1") == ["0", "1"]
    assert names("n2") == ["0", "1", "2"]
    assert names(None) == ["0"]


def test_without_a_name_the_pool_has_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    for host, name in (("Büro PC_1.local", "b-ro-pc_1.local"), ("---", "node"), ("x" * 70, "x" * 63)):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        tree = settings()
        assert pool_name(tree) == name
        PoolSettings(name=name)


def test_vllm_brings_its_own_model(tmp_path: Path) -> None:
    folder = VllmDeployment(engine="vllm", model=str(tmp_path))
    hub = VllmDeployment(engine="vllm", model="org/model")
    tree = fill_from_catalogue(settings(ModelSettings(name="v", deployments=(folder, hub))), CATALOGUE)
    first, second = plan_deployments(tree, CATALOGUE)
    assert (first.name, first.spec, first.model_folder) == ("v/vllm-0", None, tmp_path)
    assert (second.spec, second.model_folder) == (None, None)
    assert first.fingerprint != second.fingerprint
    wrong = VllmDeployment(engine="vllm", model="org/model", source="hf:a/b#c")
    with pytest.raises(UserError, match="not from a source"):
        plan_deployments(settings(ModelSettings(name="v", deployments=(wrong,))), CATALOGUE)


def test_an_embedding_model_outside_the_catalogue_needs_its_tokenizer(tmp_path: Path) -> None:
    def plan(**options: Path) -> None:
        deployment = LlamaCppDeployment(engine="llama_cpp", source="file:/m/own.gguf", task="embeddings", **options)
        plan_deployments(settings(ModelSettings(name="own", deployments=(deployment,))), CATALOGUE)

    with pytest.raises(UserError, match=r"own/llama_cpp-0: .* needs its tokenizer\.json") as caught:
        plan()
    assert caught.value.exit_code is ExitCode.CONFIG
    with pytest.raises(UserError, match="there is no file"):
        plan(tokenizer=tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    plan(tokenizer=tmp_path / "tokenizer.json")


def test_deployments_of_different_files_have_names_of_their_own_in_the_store(tmp_path: Path, make_gguf: Any) -> None:
    paths = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    for filler, path in enumerate(paths):
        path.write_bytes(make_gguf(bytes([filler]) * 64))
    locals_ = tuple(LlamaCppDeployment(engine="llama_cpp", source=f"file:{path}") for path in paths)
    planned = plan_deployments(settings(ModelSettings(name="m", deployments=locals_)), CATALOGUE)
    assert [one.spec.name for one in planned] == [one.name for one in planned] == ["m/llama_cpp-0", "m/llama_cpp-1"]
    assert [one.public_name for one in planned] == ["m", "m"]
    store = ModelStore(tmp_path / "models")
    for one in planned:
        store.pull(one.spec)
    assert [model.path for model in store.list()] == paths


def test_deployments_of_one_file_share_the_public_name_in_the_store() -> None:
    locals_ = tuple(LlamaCppDeployment(engine="llama_cpp", source="file:/m/chat.gguf", parallel=n) for n in (1, 2))
    planned = plan_deployments(settings(ModelSettings(name="m", deployments=locals_)), CATALOGUE)
    assert [one.spec.name for one in planned] == ["m", "m"]
