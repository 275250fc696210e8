"""Presets: a name and a key are enough, and what they say is known to be so."""

from pathlib import Path

import pytest
from genai_prices.data_snapshot import get_snapshot

from helixflow.core.errors import ExitCode, UserError
from helixflow.launch.gateway_engines import EngineBuilder
from helixflow.launch.provider_keys import check_keys
from helixflow.pool.catalogue import Catalogue
from helixflow.pool.plan import fill_from_catalogue, plan_deployments
from helixflow.pool.presets import Preset, Presets
from helixflow.pool.sources.source import parse_source
from helixflow.settings.deployments import (
    AnthropicDeployment,
    Deployment,
    LlamaCppDeployment,
    OpenAIDeployment,
    ProviderDeployment,
)
from helixflow.settings.models import ModelSettings
from helixflow.settings.tree import Settings
from helixflow.transport.tls import client_context

CATALOGUE = Catalogue.load()
PRESETS = Presets.load()


def fill(*models: ModelSettings) -> tuple[ModelSettings, ...]:
    return fill_from_catalogue(Settings(models=models), CATALOGUE).models


def served_by(name: str, **fields: object) -> Deployment:
    (model,) = fill(ModelSettings.model_validate({"name": name, **fields}))
    (deployment,) = model.deployments
    return deployment


def test_a_name_is_enough() -> None:
    gpt = served_by("gpt-4")
    assert isinstance(gpt, OpenAIDeployment)
    assert (gpt.base_url, gpt.model, gpt.context) == ("https://api.openai.com/v1", "gpt-4", 8192)
    assert (gpt.api_key_env, gpt.api_key_file) == ("OPENAI_API_KEY", None)
    claude = served_by("claude-3-5-sonnet")
    assert isinstance(claude, AnthropicDeployment)
    assert (claude.model, claude.api_key_env) == ("claude-3-5-sonnet-latest", "ANTHROPIC_API_KEY")


@pytest.mark.parametrize(
    "name", ["gpt-3.5-turbo", "gpt-4", "gpt-4o-mini", "claude", "gemini", "llama-2-70b", "llama-3", "qwen", "mistral"]
)
def test_common_names_are_known(name: str) -> None:
    assert isinstance(served_by(name), ProviderDeployment)


def test_under_a_name_of_ones_own_and_with_a_key_from_a_file(tmp_path: Path) -> None:
    key = tmp_path / "key"
    deployment = served_by("ours", preset="gemini", api_key_file=key)
    assert isinstance(deployment, OpenAIDeployment)
    assert (deployment.api_key_file, deployment.api_key_env) == (key, None)
    assert deployment.model != "ours"


def test_the_catalogue_goes_before_presets() -> None:
    assert isinstance(served_by("smollm2-135m-instruct"), LlamaCppDeployment)


def test_one_that_is_fetched() -> None:
    deployment = served_by("qwen2.5-0.5b")
    assert isinstance(deployment, LlamaCppDeployment)
    assert deployment.load == "first_use"
    settings = Settings(models=fill(ModelSettings(name="qwen2.5-0.5b")))
    (planned,) = plan_deployments(settings, CATALOGUE)
    assert planned.spec is not None
    assert planned.spec.source.startswith("hf:Qwen/")


def test_filling_again_changes_nothing() -> None:
    once = fill(ModelSettings(name="gpt-4"), ModelSettings(name="x", preset="gpt-4"))
    assert fill(*once) == once


def test_splits_stay_as_they_are() -> None:
    split = ModelSettings.model_validate({"name": "s", "split": [{"model": "gpt-4", "weight": 1}]})
    assert fill(ModelSettings(name="gpt-4"), split)[1] == split


def test_unknown_names_are_told_with_those_like_them() -> None:
    for fields in ({"name": "gtp-4o"}, {"name": "x", "preset": "gtp-4o"}):
        with pytest.raises(UserError) as error:
            served_by(**fields)
        assert error.value.exit_code is ExitCode.CONFIG
        assert "gpt-4o" in error.value.message


def test_a_key_file_without_use_is_a_mistake() -> None:
    with pytest.raises(UserError, match="api_key_file"):
        served_by("smollm2-135m-instruct", api_key_file="/key")
    with pytest.raises(ValueError, match="a deployment has its own key"):
        ModelSettings(name="m", preset="gpt-4", deployments=(OpenAIDeployment(engine="openai", base_url="http://a"),))


def test_a_missing_key_is_told_with_both_ways_to_give_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    models = fill(ModelSettings(name="gpt-4"))
    with pytest.raises(UserError) as error:
        check_keys(models)
    assert error.value.exit_code is ExitCode.CONFIG
    assert "OPENAI_API_KEY" in error.value.message
    assert "api_key_file" in error.value.message
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    check_keys(models)


@pytest.mark.parametrize("preset", PRESETS.all(), ids=lambda preset: str(preset.name))
def test_every_preset_can_be_built(preset: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    (model,) = fill(ModelSettings(name=preset.name))
    (deployment,) = model.deployments
    if isinstance(deployment, LlamaCppDeployment):
        assert deployment.source is not None
        parse_source(deployment.source)
        return
    assert isinstance(deployment, ProviderDeployment)
    assert deployment.base_url.startswith("https://")
    assert deployment.api_key_env is not None
    monkeypatch.setenv(deployment.api_key_env, "k")
    engine, client = EngineBuilder(client_context).build(f"{preset.name}/x-0", preset.name, deployment, None)
    assert client is not None
    assert engine is not None


@pytest.mark.parametrize("preset", [one for one in PRESETS.all() if one.provider], ids=lambda preset: str(preset.name))
def test_every_preset_names_a_model_that_its_provider_is_known_to_have(preset: Preset) -> None:
    """And says of its context what is known of it. Where prices are known they are found, too."""
    provider = PRESETS.provider_of(preset)
    assert provider is not None
    _, known = get_snapshot().find_provider_model(preset.model or preset.name, None, None, provider.base_url)
    if known.context_window is not None:
        assert preset.context == known.context_window


def test_no_name_twice() -> None:
    names = [preset.name for preset in PRESETS.all()]
    assert len(set(names)) == len(names)
    assert not set(names) & set(CATALOGUE.names())
