"""The commands that administer, against a real node: with its first key, and as who has signed in."""

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helixflow.core.keys import TOKEN_PREFIX, is_well_formed
from tests.harness.node import HELIXFLOW, Node, run_node, write_idle_config

PASSWORD = "seven grey herons wade upstream"


@dataclass(frozen=True)
class Terminal:
    """Runs commands as one user."""

    node: Node
    config_home: Path

    def run(self, *words: str, typed: str = "", **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [HELIXFLOW, *words],
            env={**self.node.environment, "XDG_CONFIG_HOME": str(self.config_home), **environment},
            input=typed,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            start_new_session=True,  # without a terminal of its own, the password comes from standard input
        )

    def must(self, *words: str, **options: str) -> str:
        done = self.run(*words, **options)
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout

    def json(self, *words: str) -> Any:
        return json.loads(self.must(*words, "--json"))


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    folder = tmp_path_factory.mktemp("administration")
    with run_node(folder / "data", HELIXFLOW_CONFIG=str(write_idle_config(folder))) as running:
        yield running


@pytest.fixture
def terminal(node: Node, tmp_path: Path) -> Terminal:
    return Terminal(node, tmp_path / "config")


def redeem(terminal: Terminal, token: str) -> None:
    body = json.dumps({"token": token, "password": PASSWORD, "name": "Ada"}).encode()
    subprocess.run(
        ["curl", "-sSf", "-H", "content-type: application/json", "--data-binary", "@-",
         f"http://127.0.0.1:{terminal.node.port}/api/v1/auth/redeem"],
        input=body, check=True, capture_output=True, timeout=30,
    )  # fmt: skip


def test_keys_live_from_creation_to_revocation(terminal: Terminal) -> None:
    assert is_well_formed(terminal.must("keys", "create", "ci", "--expires", "30d", "--quiet").removesuffix("\n"))
    created = terminal.json("keys", "create", "laptop", "--model", "idle", "--network", "127.0.0.0/8")
    assert (created["name"], created["expires_at"], created["state"]) == ("laptop", None, "valid")
    assert (created["models"], created["networks"]) == (["idle"], ["127.0.0.0/8"])
    assert is_well_formed(created["key"])
    rotated = terminal.json("keys", "rotate", created["key_id"], "--overlap", "0h")
    assert rotated["rotated_from"] == created["key_id"] and rotated["models"] == ["idle"]
    assert rotated["key"] != created["key"]
    out = terminal.must("keys", "revoke", rotated["key_id"])
    assert out == f"revoked laptop ({rotated['key_id']})\n"
    states = {key["key_id"]: key["state"] for key in terminal.json("keys", "list")["keys"]}
    assert states[rotated["key_id"]] == "revoked"
    listed = terminal.must("keys", "list")
    assert created["key"] not in listed and "does not expire" in listed
    for words in (("revoke", "key_none"), ("create", ""), ("rotate", "key_none")):
        done = terminal.run("keys", *words)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr


def test_a_person_is_invited_signs_in_and_works_with_a_role(terminal: Terminal) -> None:
    project = terminal.json("projects", "create", "Research")["id"]
    invited = terminal.must("users", "invite", "ada@example.com", "--role", "developer", "--project", project)
    token = next(word for word in invited.split() if word.startswith(TOKEN_PREFIX))
    redeem(terminal, token)
    [user] = terminal.json("users", "list", "--email", "ada@example.com")["users"]
    members = terminal.json("members", "list", "--project", project)["members"]
    assert [(member["user_id"], member["role"]) for member in members] == [(user["id"], "developer")]

    wrong = terminal.run("login", "--email", "ada@example.com", typed="not the password\n")
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr
    signed_in = terminal.must("login", "--email", "ada@example.com", "--project", project, typed=f"{PASSWORD}\n")
    assert "as ada@example.com" in signed_in
    file = terminal.config_home / "helixflow" / "logins.json"
    assert file.stat().st_mode & 0o777 == 0o600
    assert PASSWORD not in file.read_text()
    # As Ada from here on: she sees her project, and may not make others.
    assert [found["id"] for found in terminal.json("projects", "list")["projects"]] == [project]
    refused = terminal.run("projects", "create", "Another")
    assert refused.returncode == 1 and "projects:create" in refused.stderr
    # A key in the environment goes first.
    assert terminal.run("projects", "list", HELIXFLOW_API_KEY="hfk_wrong").returncode == 1

    # An access token that is about to end is renewed, and the refresh token with it.
    before = json.loads(file.read_text())
    [(url, login)] = before.items()
    file.write_text(json.dumps({url: {**login, "access_expires_at": 0}}))
    terminal.must("projects", "list")
    after = json.loads(file.read_text())[url]
    assert after["refresh_token"] != login["refresh_token"] and after["access_expires_at"] > 0
    # A session that was ended says so.
    file.write_text(json.dumps({url: {**login, "access_expires_at": 0}}))
    ended = terminal.run("projects", "list")
    assert (ended.returncode, ended.stderr) == (1, "helixflow: the session has ended; sign in again: helixflow login\n")
    assert json.loads(file.read_text()) == {}
    assert "Not signed in" in terminal.must("logout")


def test_logging_out_ends_the_session(terminal: Terminal) -> None:
    made = terminal.json("users", "create", "bob@example.com", "--name", "Bob", "--role", "viewer")
    redeem(terminal, made["token"])
    terminal.must("login", typed=f"bob@example.com\n{PASSWORD}\n")
    file = terminal.config_home / "helixflow" / "logins.json"
    kept = file.read_text()
    assert terminal.must("logout").startswith("Signed out of http://")
    file.write_text(kept)
    assert terminal.run("roles", "list").returncode == 1


def test_users_from_creation_to_deletion(terminal: Terminal) -> None:
    user_id = terminal.json("users", "create", "eve@example.com", "--name", "Eve", "--role", "viewer")["user"]["id"]
    assert terminal.must("users", "suspend", user_id) == f"suspended eve@example.com ({user_id})\n"
    assert terminal.must("users", "reinstate", user_id) == f"reinstated eve@example.com ({user_id})\n"
    assert TOKEN_PREFIX in terminal.must("users", "reset", user_id)
    assert terminal.json("members", "set", user_id, "--role", "auditor")["role"] == "auditor"
    assert terminal.must("members", "remove", user_id) == f"removed {user_id} from the organisation\n"
    assert terminal.must("users", "delete", user_id) == f"deleted {user_id}\n"
    assert "eve@example.com" not in terminal.must("users", "list")
    twice = terminal.run("users", "delete", user_id)
    assert (twice.returncode, twice.stdout, twice.stderr.count("\n")) == (1, "", 1)


def test_roles_organisations_and_service_accounts(terminal: Terminal) -> None:
    role = terminal.json("roles", "create", "key-keeper", "--permission", "keys:read", "--permission", "keys:revoke")
    assert terminal.must("roles", "show", role["id"]) == "key-keeper: \n  keys:read\n  keys:revoke\n"
    assert "key-keeper" in terminal.must("roles", "list")
    account = terminal.json("service-accounts", "create", "nightly", "--role", "developer")["id"]
    assert "nightly" in terminal.must("service-accounts", "list")
    assert terminal.json("keys", "create", "for-nightly", "--owner", account)["owner_id"] == account
    assert terminal.must("service-accounts", "delete", account) == f"deleted {account}\n"
    assert terminal.must("roles", "delete", role["id"]) == f"deleted {role['id']}\n"
    bad = terminal.run("roles", "create", "Bad Name", "--permission", "no:such")
    assert bad.returncode == 1
    assert bad.stderr.count("\n") == 2 and "name: " in bad.stderr and "permissions.0: " in bad.stderr

    made = terminal.must("orgs", "create", "Example Ltd", "--owner", "owner@example.com")
    assert "Example Ltd" in made and TOKEN_PREFIX in made
    names = {found["name"]: found["id"] for found in terminal.json("orgs", "list")["organisations"]}
    assert "Example Ltd" in names
    own = next(found for name, found in names.items() if name != "Example Ltd")
    assert "kept for 365 days" in terminal.must("orgs", "update", own, "--audit-retention-days", "365")
    assert own in terminal.must("orgs", "show", own)
    assert terminal.run("orgs", "show", names["Example Ltd"]).returncode == 1


def test_credentials_do_not_travel_in_the_clear(terminal: Terminal) -> None:
    done = terminal.run("users", "list", HELIXFLOW_BASE_URL="http://example.com/v1", HELIXFLOW_API_KEY="hfk_x")
    assert (done.returncode, done.stdout) == (2, "")
    assert "https" in done.stderr and "hfk_x" not in done.stderr


def test_nobody_home(terminal: Terminal, tmp_path: Path) -> None:
    environment = {"HELIXFLOW_DATA_DIR": str(tmp_path / "none"), "HELIXFLOW_GATEWAY__HTTP_PORT": "9"}
    done = terminal.run("users", "list", **environment)
    assert done.returncode == 6 and "helixflow serve" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_doctor_sees_the_running_service(terminal: Terminal) -> None:
    report = terminal.json("doctor")
    checks = {check["name"]: check for check in report["checks"]}
    assert report["ok"] is True and checks["services"]["running"] is True
