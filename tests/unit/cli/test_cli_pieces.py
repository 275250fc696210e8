"""The decisions behind the commands: expiry, target and key, figures, connection lines, CPU features."""

import json
import shlex
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from helixflow.cli.api import Answer
from helixflow.cli.installation import check_data_dir, check_models, plan
from helixflow.cli.machine import check_gpu, check_memory, check_python, known_features
from helixflow.cli.moments import parse_expiry
from helixflow.cli.output import printable
from helixflow.cli.serve import welcome_arguments
from helixflow.cli.target import choose_target
from helixflow.cli.welcome import connection_lines, figures
from helixflow.core.errors import UserError
from helixflow.settings.client import ClientEnvironment, client_environment
from helixflow.settings.load import load_settings
from helixflow.settings.tree import Settings

NOW = datetime(2026, 11, 22, tzinfo=UTC).timestamp()
EMPTY = ClientEnvironment(None, None, None, None)
ANSWER = Answer("Paris.", "m", "stop", 10, 9, False, first_token_s=0.5, total_s=2.5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30d", NOW + 30 * 86_400),
        ("12H", NOW + 12 * 3600),
        ("2w", NOW + 14 * 86_400),
        ("2026-12-31", datetime(2026, 12, 31, tzinfo=UTC).timestamp()),
        ("2026-12-31T10:00:00+02:00", datetime(2026, 12, 31, 8, tzinfo=UTC).timestamp()),
    ],
)
def test_expiry_is_a_span_or_a_moment(text: str, expected: float) -> None:
    assert parse_expiry(text, NOW) == expected


@pytest.mark.parametrize("text", ["", "30", "d", "-1d", "0d", "2026-13-01", "2026-11-21", "999999w", "tomorrow", "١d"])
def test_expiry_refuses_the_rest(text: str) -> None:
    with pytest.raises(UserError):
        parse_expiry(text, NOW)


def settings_with_key(tmp_path: Path) -> Settings:
    (tmp_path / "bootstrap.key").write_text("hfk_first\n")
    return load_settings(environ={"HELIXFLOW_DATA_DIR": str(tmp_path)})


def test_the_local_gateway_gets_the_first_key_unless_another_is_given(tmp_path: Path) -> None:
    settings = settings_with_key(tmp_path)
    target = choose_target(settings, EMPTY, None, None)
    assert (target.base_url, target.api_key, target.ours) == ("http://127.0.0.1:8080/v1", "hfk_first", True)
    openai_key = replace(EMPTY, openai_api_key="sk-1")
    assert choose_target(settings, openai_key, None, None).api_key == "hfk_first"
    assert choose_target(settings, replace(EMPTY, bootstrap_api_key="b"), None, None).api_key == "b"
    assert choose_target(settings, replace(EMPTY, api_key="e"), None, None).api_key == "e"
    assert choose_target(settings, replace(EMPTY, api_key="e"), None, "option").api_key == "option"
    assert choose_target(settings, EMPTY, "http://127.0.0.1:8080", None).api_key == "hfk_first"


def test_a_foreign_server_never_gets_the_first_key(tmp_path: Path) -> None:
    settings = settings_with_key(tmp_path)
    foreign = choose_target(settings, EMPTY, "https://api.example.com/v1", None)
    assert (foreign.api_key, foreign.spare_key, foreign.ours) == (None, None, False)
    with_key = choose_target(settings, replace(EMPTY, openai_api_key="sk-1"), "https://api.example.com/v1", None)
    assert with_key.api_key == "sk-1"
    from_environment = choose_target(settings, replace(EMPTY, base_url="https://e.example/v1"), None, None)
    assert from_environment.base_url == "https://e.example/v1"


def test_a_server_on_this_machine_must_show_itself_before_it_gets_the_first_key(tmp_path: Path) -> None:
    target = choose_target(settings_with_key(tmp_path), EMPTY, "http://localhost:11434/v1", None)
    assert (target.api_key, target.spare_key) == (None, "hfk_first")


def test_client_environment_ignores_empty_values() -> None:
    assert client_environment({"HELIXFLOW_API_KEY": " ", "OPENAI_API_KEY": " k "}) == replace(EMPTY, openai_api_key="k")


def test_speed_counts_what_comes_after_the_first_token() -> None:
    assert ANSWER.tokens_per_s == pytest.approx(4.0)
    assert replace(ANSWER, first_token_s=None).tokens_per_s is None
    assert replace(ANSWER, completion_tokens=1).tokens_per_s is None
    assert figures(ANSWER) == "Time to first token 0.50 s, then 4 tokens/s (9 tokens in 2.50 s)."


@pytest.mark.parametrize(("chat", "embedding"), [("m/1:a", "e"), (None, "e")])
def test_the_printed_curl_line_and_snippet_are_whole(chat: str | None, embedding: str) -> None:
    lines = connection_lines("http://127.0.0.1:1/v1", "https://127.0.0.1:2/v1", "hfk_k", chat, embedding)
    curl = shlex.split(next(line for line in lines if line.startswith("curl ")))
    assert "Authorization: Bearer hfk_k" in curl
    assert json.loads(curl[-1])["model"] == (chat or embedding)
    start = next(i for i, line in enumerate(lines) if line.startswith("from openai"))
    compile("\n".join(lines[start:-3]), "snippet", "exec")


def test_the_welcome_asks_a_loaded_model_of_ours_first(tmp_path: Path) -> None:
    config = tmp_path / "h.toml"
    config.write_text(
        '[[models]]\nname = "paid"\n[[models.deployments]]\nengine = "openai"\nbase_url = "https://x.example/v1"\n'
        '[[models]]\nname = "all-minilm-l6-v2"\n[[models]]\nname = "smollm2-135m-instruct"\n'
    )
    argv = welcome_arguments(load_settings(config, environ={}))
    assert argv[argv.index("--chat-model") + 1] == "smollm2-135m-instruct"
    config.write_text('[[models]]\nname = "all-minilm-l6-v2"\n')
    argv = welcome_arguments(load_settings(config, environ={}))
    assert "--chat-model" not in argv
    assert argv[argv.index("--embedding-model") + 1] == "all-minilm-l6-v2"


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert printable("a\033[2J\r\x07b\n\tc\x9b1m é") == "a[2Jb\n\tc1m é"


def test_cpu_features_of_both_architectures() -> None:
    assert known_features({"avx", "avx2", "fma", "avx512f", "sse"}) == ["AVX", "AVX2", "FMA", "AVX512"]
    assert known_features({"asimd", "asimddp"}) == ["NEON", "DOTPROD"]


def test_doctor_reports_models_disk_and_memory(tmp_path: Path) -> None:
    settings = load_settings(environ={"HELIXFLOW_DATA_DIR": str(tmp_path / "new" / "dir")})
    planned = plan(settings)
    assert check_data_dir(settings, planned).status == "ok"
    assert not (tmp_path / "new").exists()
    advice = [finding.advice.rsplit(" ", 1)[-1] for finding in check_models(settings, planned)]
    assert advice == ["smollm2-135m-instruct", "all-minilm-l6-v2"]
    assert check_python().status == "ok"
    assert check_gpu().status == "ok"
    huge = [replace(one, spec=replace(one.spec, ram_bytes=1 << 50)) for one in planned]
    assert check_memory(huge, running=False).status == "problem"


def test_doctor_finds_a_data_dir_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    settings = load_settings(environ={"HELIXFLOW_DATA_DIR": str(tmp_path / "file" / "below")})
    finding = check_data_dir(settings, ())
    assert finding.status == "problem"
    assert str(tmp_path / "file") in finding.message
