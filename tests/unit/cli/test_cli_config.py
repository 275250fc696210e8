"""`config check` and `config show`."""

import json
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helixflow.pki.certificates import Usage, create_leaf, create_root
from helixflow.pki.names import parse_names

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


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """Files that settings may name: good ones and bad ones."""
    pair, other = (
        create_leaf(
            create_root(time.time()), "test", parse_names(["localhost"]), Usage.HTTPS, now=time.time(), life_s=60
        )
        for _ in range(2)
    )
    found = {name: tmp_path / name for name in ("cert", "key", "other_key", "open_key", "text", "master", "missing")}
    found["cert"].write_bytes(pair.chain_pem())
    found["key"].write_bytes(pair.key_pem())
    found["other_key"].write_bytes(other.key_pem())
    found["open_key"].write_bytes(pair.key_pem())
    found["text"].write_text("nothing of use\n")
    found["master"].write_text("ab" * 32)
    for path in found.values():
        if path.exists():
            path.chmod(0o600)
    found["open_key"].chmod(0o644)
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            '[gateway]\ncertificate_file = "{missing}"\nkey_file = "{key}"\n',
            ":2: gateway.certificate_file: {missing}: there is no such file",
        ),
        (
            '[gateway]\ncertificate_file = "{cert}"\nkey_file = "{missing}"\n',
            ":3: gateway.key_file: {missing}: there is no such file",
        ),
        (
            '[gateway]\ncertificate_file = "{cert}"\nkey_file = "{open_key}"\n',
            ":3: gateway.key_file: {open_key}: other users have access to this key",
        ),
        (
            '[gateway]\ncertificate_file = "{cert}"\nkey_file = "{other_key}"\n',
            ":2: gateway.certificate_file: {cert}: the key and the certificate do not belong together",
        ),
        (
            '[gateway]\ncertificate_file = "{text}"\nkey_file = "{key}"\n',
            ":2: gateway.certificate_file: {text}: there is no certificate in it",
        ),
        (
            '[gateway]\ntls_names = ["good.example", "not a name"]\n',
            ":2: gateway.tls_names[1]: 'not a name' is neither a DNS name nor an address",
        ),
        (
            '[gateway]\ntrusted_proxies = ["10.0.0.0/8", "::/0"]\n',
            ":2: gateway.trusted_proxies[1]: ::/0 trusts everybody",
        ),
        (
            '[gateway]\ntrusted_proxies = ["::ffff:10.0.0.0/104"]\n',
            ":2: gateway.trusted_proxies[0]: ::ffff:a00:0/104 matches nothing; write 10.0.0.0/8",
        ),
        ('[auth]\nmaster_key_file = "{missing}"\n', ":2: auth.master_key_file: {missing}: no such file"),
        ('[auth]\nmaster_key_file = "{text}"\n', ":2: auth.master_key_file: {text}: "),
        ('[auth]\nmaster_key_env = "NO_SUCH"\n', ":2: auth.master_key_env: the environment variable NO_SUCH"),
        ('[auth]\nmaster_key_env = "SHORT"\n', ":2: auth.master_key_env: environment variable SHORT: "),
        (
            '[database]\nurl = "postgresql://app@db/name"\npassword_file = "{missing}"\n',
            ":3: database.password_file: cannot read the secret file {missing}",
        ),
        (
            '[database]\nurl = "postgresql://app@db/name"\npassword_env = "NO_SUCH"\n',
            ":3: database.password_env: the environment variable NO_SUCH",
        ),
        ('[database]\nurl = "postgresql://db/name"\n', ":2: database.url: it names no user"),
        (
            '[database]\nurl = "postgresql://app@db/name?sslmode=maybe"\n',
            ":2: database.url: sslmode is one of ",
        ),
        (
            '[database]\nurl = "postgresql://app@db/name?sslrootcert={missing}"\n',
            ":2: database.url: sslrootcert: no certificates (PEM) can be read from {missing}",
        ),
    ],
)
def test_check_looks_at_what_identity_refers_to(
    run: Callable[..., Any],
    tmp_path: Path,
    places: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    expected: str,
) -> None:
    monkeypatch.setenv("SHORT", "secret-but-short")
    file = write(tmp_path / "h.toml", text.format(**places))
    outcome = run("--config", file, "config", "check")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (3, "", 1)
    assert f"{file}{expected.format(**places)}" in outcome.err
    assert "secret-but-short" not in outcome.err


def test_check_accepts_good_files_and_connects_to_nothing(
    run: Callable[..., Any], tmp_path: Path, data_dir: Path, places: dict[str, Path]
) -> None:
    text = """
    [gateway]
    certificate_file = "{cert}"
    key_file = "{key}"
    tls_names = ["models.example", "*.models.example", "192.0.2.1", "::1"]
    trusted_proxies = ["10.0.0.0/8", "192.0.2.1", "fd00::/8"]
    [auth]
    master_key_file = "{master}"
    [database]
    url = "postgresql://app@192.0.2.1/name?sslmode=verify-full&sslrootcert={cert}"
    password_file = "{text}"
    """
    file = write(tmp_path / "h.toml", text.format(**places))
    outcome = run("--config", file, "config", "check")
    assert (outcome.code, outcome.err) == (0, "")
    assert not data_dir.exists(), "nothing is made"


def test_check_accepts_a_good_file_and_none(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("config", "check").code == 0
    file = write(tmp_path / "h.toml", PROVIDER)
    missing = run("--config", file, "config", "check")
    assert (missing.code, "headers: the environment variable ORG is not set" in missing.err) == (3, True)
    monkeypatch.setenv("ORG", "acme")
    assert run("--config", file, "config", "check").out == "the configuration is fine\n"


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
