"""`config check` and `config show`."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROVIDER = """
[gateway]
http_port = 8081
[[models]]
name = "gpt-4"
[[models.deployments]]
engine = "openai"
base_url = "https://api.example.com/v1"
headers = { "x-org" = "${ORG}", "authorization" = "Bearer sk-secret", "x-quoted" = "a \\"b\\"" }
"""


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[gateway]\nhttp_prot = 1\n", "{file}:2: gateway.http_prot: unknown key"),
        ("[gateway]\nhttp_port = 'x'\n", "{file}:2: gateway.http_port: "),
        ("a = \n", "{file}: not valid TOML"),
        ("[[models]]\nname = 'smollm2'\n", "{file}:1: models[0]: model 'smollm2'"),
        (
            PROVIDER + 'api_key_file = "/nowhere/key"\n',
            "{file}:10: models[0].deployments[0].api_key_file: /nowhere/key is not a readable file",
        ),
        (
            PROVIDER + 'api_key_env = "HELIXFLOW_NO_SUCH_KEY"\n',
            "{file}:10: models[0].deployments[0].api_key_env: the environment variable",
        ),
        (
            '[[models]]\nname = "m"\n[[models.deployments]]\nengine = "llama_cpp"\n'
            'source = "file:/m.gguf"\nbinary = "/nowhere/llama-server"\n',
            "{file}:6: models[0].deployments[0].binary: /nowhere/llama-server is not an executable file",
        ),
    ],
)
def test_check_names_file_line_and_setting(run: Callable[..., Any], tmp_path: Path, text: str, expected: str) -> None:
    file = write(tmp_path / "h.toml", text)
    outcome = run("--config", file, "config", "check")
    assert outcome.code == 3
    assert outcome.out == ""
    assert expected.format(file=file) in outcome.err
    listed = run("--config", file, "config", "check", "--json")
    assert listed.code == 3
    report = json.loads(listed.out)
    assert report["ok"] is False
    assert any(expected.format(file=file) in problem for problem in report["problems"])


def test_check_accepts_a_good_file_and_none(run: Callable[..., Any], tmp_path: Path) -> None:
    assert run("config", "check").code == 0
    assert run("--config", write(tmp_path / "h.toml", PROVIDER), "config", "check").out == "the configuration is fine\n"


def test_show_is_toml_that_reads_back_and_hides_secrets(run: Callable[..., Any], tmp_path: Path) -> None:
    file = write(tmp_path / "h.toml", PROVIDER)
    shown = run("--config", file, "config", "show").out
    tree = tomllib.loads(shown)
    assert "sk-secret" not in shown
    assert tree["gateway"]["http_port"] == 8081
    headers = tree["models"][0]["deployments"][0]["headers"]
    assert headers == {"x-org": "${ORG}", "authorization": "…hidden…", "x-quoted": "…hidden…"}
    as_json = json.loads(run("--config", file, "config", "show", "--json").out)
    assert as_json["settings"] == tree


def test_show_says_where_values_come_from(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "h.toml", PROVIDER)
    monkeypatch.setenv("HELIXFLOW_LOG__LEVEL", "debug")
    origins = json.loads(run("--config", file, "config", "show", "--json").out)["origins"]
    assert origins["gateway.http_port"] == f"{file}:3"
    assert origins["log.level"] == "HELIXFLOW_LOG__LEVEL"
    assert origins["models[0].deployments[0].engine"] == f"{file}:7"
    assert "gateway.host" not in origins
    lines = run("--config", file, "config", "show").out.splitlines()
    assert f"http_port = 8081  # {file}:3" in lines
    assert 'host = "127.0.0.1"' in lines
