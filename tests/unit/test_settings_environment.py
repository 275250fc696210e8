"""Lists and tables in environment variables."""

import pytest

from helixflow.core.errors import ExitCode, UserError
from helixflow.settings.load import load_settings
from helixflow.settings.origins import read_origins


def test_lists_are_json() -> None:
    settings = load_settings(environ={"HELIXFLOW_GATEWAY__CORS__ORIGINS": '["https://a.example", "https://b.example"]'})
    assert settings.gateway.cors.origins == ("https://a.example", "https://b.example")


def test_models_and_tables_are_json() -> None:
    environ = {
        "HELIXFLOW_MODELS": '[{"name": "m", "deployments": [{"engine": "llama_cpp", "source": "file:/m.gguf"}]}]',
        "HELIXFLOW_LOG": '{"level": "debug"}',
        "HELIXFLOW_LOG__FORMAT": "json",
    }
    settings = load_settings(environ=environ)
    assert [model.name for model in settings.models] == ["m"]
    assert (settings.log.level, settings.log.format) == ("debug", "json")
    origins = read_origins(None, environ)
    assert origins["log", "level"] == "HELIXFLOW_LOG"
    assert origins["models", 0, "deployments", 0, "source"] == "HELIXFLOW_MODELS"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("[https://a.example]", "not valid JSON"),
        ('["a", 1]', "gateway.cors.origins[1]: "),
        ("a", "gateway.cors.origins: "),
    ],
)
def test_a_bad_list_names_the_variable(value: str, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        load_settings(environ={"HELIXFLOW_GATEWAY__CORS__ORIGINS": value})
    assert caught.value.exit_code is ExitCode.CONFIG
    assert f"environment variable HELIXFLOW_GATEWAY__CORS__ORIGINS: {reason}" in caught.value.message
