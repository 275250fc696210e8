"""The commands that administer, against a real node: with its first key, and as who has signed in."""

import io
import json
import sys
import time
from base64 import b32decode
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helixflow.auth.totp import STEP_S, code_at
from helixflow.cli.main import main
from helixflow.core.keys import TOKEN_PREFIX, is_well_formed
from tests.harness.node import HELIXFLOW, Node, run_node, write_idle_config
from tests.harness.terminal import Conversation, converse

PASSWORD = "seven grey herons wade upstream"
NEW_PASSWORD = "eight grey herons fly downstream"
NOTE = "helixflow: nobody is signed in: acting with the bootstrap key of this server\n"


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Terminal:
    """Runs commands as one user: in this process with `run`, as a process of its own with `talk`."""

    node: Node
    config_home: Path

    def run(self, *words: str, typed: str = "", **environment: str) -> Done:
        streams = [io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8") for text in (typed, "", "")]
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**self.environment, **environment}.items():
                patch.setenv(name, value)
            # It would bind every logger of this process to a stream that closes with the test.
            patch.setattr("helixflow.telemetry.logs.configure_logging", lambda *_args, **_options: None)
            for name, stream in zip(("stdin", "stdout", "stderr"), streams, strict=True):
                patch.setattr(sys, name, stream)
            code = main(words)
        texts = []
        for stream in streams[1:]:
            stream.seek(0)
            texts.append(stream.read())
        return Done(code, *texts)

    def talk(self, *command: str | Path) -> AbstractContextManager[Conversation]:
        """Runs a command for somebody at a terminal."""
        return converse(*command, environment=self.environment)

    @property
    def environment(self) -> dict[str, str]:
        return {**self.node.environment, "XDG_CONFIG_HOME": str(self.config_home)}

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


def token_in(text: str) -> str:
    return next(word for word in text.split() if word.startswith(TOKEN_PREFIX))


def redeem(terminal: Terminal, token: str, *options: str) -> str:
    return terminal.must("redeem", *options, typed=f"{token}\n{PASSWORD}\n")


def sign_up(terminal: Terminal, email: str, role: str = "viewer") -> None:
    """Makes an account and signs in as its owner."""
    redeem(terminal, terminal.json("users", "create", email, "--name", email[:3], "--role", role)["token"])
    terminal.must("login", "--email", email, typed=f"{PASSWORD}\n")


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


def test_a_key_is_changed(terminal: Terminal) -> None:
    key_id = terminal.json("keys", "create", "bot", "--expires", "30d", "--model", "idle", "--network", "::1")["key_id"]
    narrow = terminal.json(
        "keys", "update", key_id, "--name", "robot", "--scope", "models:read", "--network", "10.1.0.0/16"
    )
    assert (narrow["name"], narrow["scopes"], narrow["networks"]) == ("robot", ["models:read"], ["10.1.0.0/16"])
    assert narrow["models"] == ["idle"] and narrow["expires_at"] is not None
    wide = terminal.must("keys", "update", key_id, "--all-models", "--all-networks", "--expires", "never")
    assert wide == terminal.must("keys", "show", key_id)
    assert wide.startswith(f"robot ({key_id})\n")
    lines = dict(line.split("  ", 1) for line in wide.splitlines()[1:])
    assert {name: lines[name].strip() for name in ("state", "models", "networks")} == {
        "state": "valid (does not expire)", "models": "all", "networks": "all"
    }  # fmt: skip
    shown = terminal.json("keys", "show", key_id)
    assert (shown["models"], shown["networks"], shown["expires_at"]) == ([], [], None)
    for words in (("show", "key_none"), ("update", key_id, "--network", "nowhere")):
        done = terminal.run("keys", *words)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr


def test_a_person_is_invited_signs_in_and_works_with_a_role(terminal: Terminal) -> None:
    project = terminal.json("projects", "create", "Research")["id"]
    invited = terminal.must("users", "invite", "ada@example.com", "--role", "developer", "--project", project)
    ready = redeem(terminal, token_in(invited), "--name", "Ada")
    assert ready == "The account of ada@example.com is ready. Sign in:\nhelixflow login --email ada@example.com\n"
    [user] = terminal.json("users", "list", "--email", "ada@example.com")["users"]
    assert user["name"] == "Ada"
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
    for act, needed in (("list", "audit:read"), ("export", "audit:export")):
        refused = terminal.run("audit", act)
        assert (refused.returncode, refused.stdout) == (1, "") and needed in refused.stderr
    # A key in the environment goes first.
    assert terminal.run("projects", "list", HELIXFLOW_API_KEY="hfk_wrong").returncode == 1

    # An access token that is about to end is renewed, and the refresh token with it.
    before = json.loads(file.read_text())
    [(url, login)] = before.items()
    file.write_text(json.dumps({url: {**login, "access_expires_at": 0}}))
    terminal.must("projects", "list")
    after = json.loads(file.read_text())[url]
    assert after["refresh_token"] != login["refresh_token"] and after["access_expires_at"] > 0
    # So is one that the server refuses before its time.
    file.write_text(json.dumps({url: {**json.loads(file.read_text())[url], "access_token": "a.b.c"}}))
    terminal.must("projects", "list")
    assert json.loads(file.read_text())[url]["access_token"].startswith("eyJ")
    # A session that was ended says so.
    file.write_text(json.dumps({url: {**login, "access_expires_at": 0}}))
    ended = terminal.run("projects", "list")
    assert (ended.returncode, ended.stderr) == (1, "helixflow: the session has ended; sign in again: helixflow login\n")
    assert json.loads(file.read_text()) == {}
    assert "Not signed in" in terminal.must("logout")


def test_logging_out_ends_the_session(terminal: Terminal) -> None:
    sign_up(terminal, "bob@example.com")
    file = terminal.config_home / "helixflow" / "logins.json"
    kept = file.read_text()
    assert terminal.must("logout").startswith("Signed out of http://")
    file.write_text(kept)
    assert terminal.run("roles", "list").returncode == 1


def test_somebody_who_has_an_account_accepts_with_its_password(terminal: Terminal) -> None:
    redeem(terminal, token_in(terminal.must("users", "create", "joe@example.com", "--name", "Joe")))
    token = terminal.json("users", "invite", "joe@example.com", "--role", "viewer")["token"]
    mistaken = terminal.run("redeem", typed=f"{token}\n{NEW_PASSWORD}\n")
    assert (mistaken.returncode, mistaken.stdout) == (1, "") and "helixflow redeem --existing" in mistaken.stderr
    wrong = terminal.run("redeem", "--existing", typed=f"{token}\n{NEW_PASSWORD}\n")
    assert (wrong.returncode, wrong.stderr) == (1, "helixflow: The e-mail or the password is wrong.\n")
    with terminal.talk(HELIXFLOW, "redeem") as joe:
        joe.answer("Token: ", token)
        joe.answer("password already? [y/N]: ", "y")
        joe.answer("Password: ", PASSWORD)
        assert joe.finish() == 0, joe.shown
    assert "The account of joe@example.com is ready." in joe.shown
    again = terminal.run("redeem", "--existing", typed=f"{token}\n{PASSWORD}\n")
    assert (again.returncode, again.stderr.count("\n")) == (1, 1) and token not in again.stderr


def test_somebody_at_a_terminal_is_asked(terminal: Terminal) -> None:
    token = terminal.json("users", "invite", "grace@example.com", "--role", "viewer")["token"]
    with terminal.talk(HELIXFLOW, "redeem") as grace:
        grace.answer("Token: ", token)
        grace.answer("password already? [y/N]: ", "")
        grace.answer("Your name (for a new account): ", "Grace Hopper")
        grace.answer("New password: ", PASSWORD)
        grace.answer("Once more: ", "something else")
        grace.answer("New password: ", PASSWORD)
        grace.answer("Once more: ", PASSWORD)
        assert grace.finish() == 0, grace.shown
    assert token not in grace.shown and PASSWORD not in grace.shown
    [user] = terminal.json("users", "list", "--email", "grace@example.com")["users"]
    assert user["name"] == "Grace Hopper"


def test_people_are_told_that_they_act_with_the_bootstrap_key(terminal: Terminal) -> None:
    script = f"'{HELIXFLOW}' roles list --json | cat"
    for command, told in (([HELIXFLOW, "roles", "list"], True), (["bash", "-c", script], False)):
        with terminal.talk(*command) as somebody:
            assert somebody.finish() == 0, somebody.shown
        assert (NOTE in somebody.shown) is told
    assert terminal.run("roles", "list").stderr == ""
    sign_up(terminal, "kim@example.com")
    with terminal.talk(HELIXFLOW, "roles", "list") as kim:
        assert kim.finish() == 0
    assert NOTE not in kim.shown


def test_who_am_i(terminal: Terminal) -> None:
    key = terminal.json("whoami")
    assert (key["kind"], key["operator"], key["email"]) == ("key", True, None)
    assert key["name"] in terminal.must("whoami")
    sign_up(terminal, "zoe@example.com", "developer")
    shown = terminal.must("whoami")
    assert shown.startswith("zoe zoe@example.com (user_")
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert {"roles developer", "models: read, use", "operator no", "second factor no"} <= set(lines)
    assert terminal.json("whoami")["roles"] == ["developer"]


def test_a_password_is_changed(terminal: Terminal) -> None:
    keyed = terminal.run("password", typed=f"{PASSWORD}\n{NEW_PASSWORD}\n")
    assert keyed.returncode == 1 and "signed in" in keyed.stderr
    sign_up(terminal, "max@example.com")
    weak = terminal.run("password", typed=f"{PASSWORD}\nshort\n")
    assert (weak.returncode, weak.stdout, weak.stderr.count("\n")) == (1, "", 1)
    done = terminal.must("password", typed=f"{PASSWORD}\n{NEW_PASSWORD}\n")
    assert done == "The password is changed; your other sessions have ended.\n"
    assert terminal.json("whoami")["email"] == "max@example.com"
    assert terminal.run("login", "--email", "max@example.com", typed=f"{PASSWORD}\n").returncode == 1
    terminal.must("login", "--email", "max@example.com", typed=f"{NEW_PASSWORD}\n")


def test_a_second_factor_from_enrolment_to_its_end(terminal: Terminal) -> None:
    sign_up(terminal, "pat@example.com")
    with terminal.talk(HELIXFLOW, "mfa", "enrol") as pat:
        pat.answer("Password: ", PASSWORD)
        pat.answer("Code of the app: ", "no code")
        secret = pat.shown.split("otpauth://", 1)[0].split()[-1]
        key = b32decode(secret + "=" * (-len(secret) % 8))
        step = int(time.time()) // STEP_S
        pat.answer("Code of the app: ", code_at(key, step))
        assert pat.finish() == 0, pat.shown
    assert PASSWORD not in pat.shown and f"secret={secret}&" in pat.shown
    codes = [line.strip() for line in pat.shown.splitlines() if line.startswith("  ") and line.count("-") == 3]
    assert len(codes) == 10

    signed_in = terminal.must("login", typed=f"pat@example.com\n{PASSWORD}\n{code_at(key, step + 1)}\n")
    assert "as pat@example.com" in signed_in
    without = terminal.run("login", typed=f"pat@example.com\n{PASSWORD}\n")
    assert without.returncode == 2 and "Code of your authenticator app" in without.stderr
    renewed = terminal.must("mfa", "recovery-codes", typed=f"{PASSWORD}\n{codes[0]}\n")
    new_codes = [line.strip() for line in renewed.splitlines() if line.startswith("  ")]
    assert len(new_codes) == 10 and not set(codes) & set(new_codes)
    old = terminal.run("mfa", "disable", typed=f"{PASSWORD}\n{codes[1]}\n")
    assert (old.returncode, old.stdout, old.stderr.count("\n")) == (1, "", 1)
    assert terminal.must("mfa", "disable", typed=f"{PASSWORD}\n{new_codes[0]}\n") == "The second factor is off.\n"
    terminal.must("login", "--email", "pat@example.com", typed=f"{PASSWORD}\n")


def test_the_audit_log_is_exported_and_verified(terminal: Terminal) -> None:
    records = terminal.json("audit", "list", "--limit", "3")["records"]
    assert len(records) == 3
    assert records[-1]["at"] in terminal.must("audit", "list", "--limit", "4")
    assert "verified: records 1 to" in terminal.must("audit", "verify", "-", typed=terminal.must("audit", "export"))


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
    rescue = terminal.must("orgs", "invite-owner", names["Example Ltd"], "rescue@example.com")
    assert rescue.startswith("Invited rescue@example.com (inv_") and "helixflow redeem" in rescue
    redeem(terminal, token_in(rescue))


def test_limits_are_set_changed_and_lifted(terminal: Terminal) -> None:
    key = terminal.json("keys", "create", "limited")["key_id"]
    made = terminal.json("limits", "create", "requests-per-minute", "600", "--key", key, "--burst", "60")
    assert (made["scope"], made["subject_id"], made["value"], made["burst"]) == ("key", key, 600, 60)
    told = terminal.must("limits", "create", "tokens_per_day", "1000000", "--installation", "--model", "idle")
    assert told.startswith("Created limit_") and told.endswith(
        ": 1000000 tokens per day of idle, on installation, imposed.\n"
    )
    changed = terminal.must("limits", "update", made["id"], "--value", "1200")
    assert changed == f"Changed {made['id']}: 1200 requests per minute (60 at once), on key {key}.\n"
    listed = terminal.json("limits", "list")["limits"]
    assert {(limit["scope"], limit["value"]) for limit in listed} == {("installation", 10**6), ("key", 1200)}
    assert made["id"] in terminal.must("limits", "list")
    for limit in listed:
        assert terminal.must("limits", "delete", limit["id"]) == f"deleted {limit['id']}\n"
    assert terminal.json("limits", "list")["limits"] == []
    for words, code in (
        (("create", "requests-per-hour", "1"), 2),
        (("create", "tokens-per-day", "many"), 2),
        (("create", "tokens-per-day", "0"), 1),
        (("create", "tokens-per-day", "1", "--key", key, "--installation"), 2),
        (("create", "tokens-per-day", "1", "--key", "key_none"), 1),
        (("update", made["id"]), 2),
        (("update", made["id"], "--value", "1"), 1),
        (("delete", made["id"]), 1),
    ):
        done = terminal.run("limits", *words)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1), (words, done.stderr)


def test_budgets_are_set_changed_and_lifted(terminal: Terminal) -> None:
    project = terminal.json("projects", "list")["projects"][0]["id"]
    made = terminal.json("budgets", "create", "250.5", "--project", project, "--threshold", "90", "--threshold", "70")
    assert (made["scope"], made["subject_id"], made["cap"], made["thresholds"]) == (
        "project",
        project,
        "250.50",
        [70, 90],
    )
    assert (made["period"], made["spent"]) == ("month", "0.00")
    tokens = terminal.must("budgets", "create", "5000000", "--tokens", "--per", "total", "--impose")
    assert tokens.startswith("5000000 tokens altogether (budget_") and "organisation, imposed" in tokens
    shown = terminal.must("budgets", "update", made["id"], "--cap", "300")
    assert shown.startswith(f"$300.00 per month ({made['id']})\n") and "70 %, 90 %" in shown
    assert shown == terminal.must("budgets", "show", made["id"])
    listed = terminal.json("budgets", "list")["budgets"]
    assert {budget["cap"] for budget in listed} == {"5000000", "300.00"}
    table = terminal.must("budgets", "list")
    assert "0 tokens" in table and "$300.00" in table and f"project {project}" in table
    assert terminal.json("budgets", "events") == {"events": []}
    for budget in listed:
        terminal.must("budgets", "delete", budget["id"])
    for words, code in (
        (("create", "0"), 1),
        (("create", "1e3"), 1),
        (("create", "1.5", "--tokens"), 1),
        (("create", "1", "--per", "week"), 2),
        (("update", made["id"]), 2),
        (("show", made["id"]), 1),
        (("events", "--budget", made["id"]), 1),
    ):
        done = terminal.run("budgets", *words)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1), (words, done.stderr)


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
