"""`helixflow pki`, on files alone."""

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from helixflow.pki.certificates import KeyPair, fingerprint, names_of

Run = Callable[..., Any]


@pytest.fixture
def initialised(run: Run) -> Run:
    assert run("pki", "init").code == 0
    return run


def test_init_says_whom_to_trust_and_how(run: Run, data_dir: Path) -> None:
    outcome = run("pki", "init")
    assert (outcome.code, outcome.err) == (0, "")
    path = data_dir / "pki" / "ca.crt"
    assert fingerprint(x509.load_pem_x509_certificate(path.read_bytes())) in outcome.out
    for how in (f"curl --cacert {path}", f"SSL_CERT_FILE={path}", "update-ca-certificates", "add-trusted-cert"):
        assert how in outcome.out
    again = run("pki", "init")
    assert again.code == 1
    assert "never overwritten" in again.err


def test_show_lists_what_there_is(initialised: Run, data_dir: Path) -> None:
    shown = json.loads(initialised("pki", "show", "--json").out)
    assert shown["ca_certificate"] == str(data_dir / "pki" / "ca.crt")
    assert shown["issues_here"] is True
    states = {one["service"]: one["state"] for one in shown["certificates"]}
    assert states == dict.fromkeys(("console", "control", "gateway", "https", "monitoring", "shipper"), "valid")
    (data_dir / "pki" / "services" / "gateway.pem").write_bytes(b"")
    table = initialised("pki", "show").out
    assert "unusable" in table
    assert all(service in table for service in states)


def test_rotate_changes_every_certificate(initialised: Run, data_dir: Path) -> None:
    services = data_dir / "pki" / "services"
    before = {path.name: path.read_bytes() for path in services.iterdir()}
    assert initialised("pki", "rotate").code == 0
    assert all((services / name).read_bytes() != content for name, content in before.items())


def test_rotate_with_a_new_authority(initialised: Run) -> None:
    before = json.loads(initialised("pki", "show", "--json").out)["roots"]
    assert initialised("pki", "rotate", "--ca", "--settle", "0").code == 0
    after = json.loads(initialised("pki", "show", "--json").out)["roots"]
    assert after[1:] == before
    assert after[0] not in before


def test_issue_for_another_node(initialised: Run, tmp_path: Path) -> None:
    out = tmp_path / "gateway.pem"
    outcome = initialised("pki", "issue", "gateway", "--name", "gw2.example", "--out", str(out), "--hours", "48")
    assert outcome.code == 0
    assert "services/gateway.pem" in outcome.out
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert "gw2.example" in names_of(KeyPair.parse(out.read_bytes()).certificate).dns


def test_revoke_by_service_and_by_serial(initialised: Run) -> None:
    listed = json.loads(initialised("pki", "show", "--json").out)["certificates"]
    serials = {one["service"]: one["serial"] for one in listed}
    assert (
        initialised("pki", "revoke", "console", "--json").out
        == json.dumps({"revoked": [serials["console"]]}, indent=2) + "\n"
    )
    assert f"revoked {serials['gateway']}" in initialised("pki", "revoke", serials["gateway"]).out
    states = {one["state"] for one in json.loads(initialised("pki", "show", "--json").out)["certificates"]}
    assert states == {"valid"}


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("issue", "admin"), 2, "no service"),
        (("issue", "gateway", "--name", "x.example"), 2, "--out"),
        (("issue", "https", "--out", "{tmp}/x.pem"), 2, "--name"),
        (("issue", "gateway", "--name", "not a name", "--out", "{tmp}/x.pem"), 3, "neither a DNS name"),
        (("issue", "gateway", "--out", "{tmp}/nowhere/x.pem"), 7, "cannot be written"),
        (("init", "--ca-certificate", "{tmp}/c.pem"), 2, "together"),
        (("rotate", "--ca-certificate", "{tmp}/c.pem", "--ca-key", "{tmp}/k.pem"), 2, "--ca"),
        (("rotate", "--ca", "--ca-certificate", "{tmp}/c.pem", "--ca-key", "{tmp}/k.pem"), 3, "no such file"),
        (("revoke", "nobody"), 1, "on record"),
    ],
)
def test_what_cannot_be_done_is_one_clear_line(
    initialised: Run, tmp_path: Path, words: tuple[str, ...], code: int, says: str
) -> None:
    outcome = initialised("pki", *(word.replace("{tmp}", str(tmp_path)) for word in words))
    assert outcome.code == code
    assert says in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("words", [("show",), ("rotate",), ("issue", "gateway"), ("revoke", "gateway")])
def test_without_an_authority_it_says_how_to_get_one(run: Run, words: tuple[str, ...]) -> None:
    outcome = run("pki", *words)
    assert outcome.code == 3
    assert "helixflow pki init" in outcome.err
