"""A whole life of an installation, with every secret that crosses the wire noted down; then everything that was written
and shown is searched for them. Prompts and engine keys are the business of test_secrecy.py.
"""

import base64
import io
import json
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from helixflow.auth.audit.verify import verify
from helixflow.auth.totp import STEP_S, code_at
from helixflow.core.keys import generate_key
from helixflow.pool.manifest import StoredModel
from tests.harness.files import read_files
from tests.harness.node import Node, command_of, run_node
from tests.harness.wire import Answer, request

API: Final = "/api/v1"
# Fields of requests and answers whose values nobody else may see.
SECRET_FIELDS: Final = frozenset(
    {"password", "current_password", "new_password", "access_token", "refresh_token", "token", "invitation_token"}
    | {"challenge", "secret", "uri", "codes"}
)
NOBODY: Final = ""
JSON_TYPE: Final = {"content-type": "application/json"}


class Witness:
    """Talks to the admin API as anybody, and remembers each secret that was sent or answered, by where it was seen."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.secrets: dict[str, str] = {node.key: "bootstrap key"}
        # What people put where it is shown again: the database holds that as it was given.
        self.pasted: set[str] = set()
        self.refusals: list[str] = []

    async def ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, credential: str | None = None
    ) -> Answer:
        """With the bootstrap key unless another credential is given ('' for none)."""
        credential = self.node.key if credential is None else credential
        if credential:
            self.secrets.setdefault(credential, f"credential of {method} {path}")
        if body is not None:
            self._note(body, f"request of {method} {path}")
        content = json.dumps(body).encode() if body is not None else None
        async with await self.node.connect() as wire:
            answer = await wire.ask(request(method, path, content, credential or None, JSON_TYPE if content else None))
        if answer.status >= 400:
            # Whoever asked for an address may be told that there is nothing at it.
            self.refusals.append(answer.body.decode().replace(path, ""))
        elif answer.headers.get("content-type", "").startswith("application/json"):
            self._note(answer.json, f"answer of {method} {path}")
        return answer

    async def do(self, method: str, path: str, body: Mapping[str, Any] | None = None, **options: Any) -> Any:
        """The answer, JSON, of what must succeed."""
        answer = await self.ask(method, API + path, body, **options)
        assert 200 <= answer.status < 300, (method, path, answer.status, answer.body)
        return answer.json if answer.body else None

    async def refused(self, method: str, path: str, body: Mapping[str, Any] | None = None, **options: Any) -> int:
        answer = await self.ask(method, API + path, body, **options)
        assert 400 <= answer.status < 500, (method, path, answer.status, answer.body)
        return answer.status

    def _note(self, value: Any, where: str, field: str = "") -> None:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                self._note(inner, where, name)
        elif isinstance(value, list):
            for inner in value:
                self._note(inner, where, field)
        elif isinstance(value, str) and field in SECRET_FIELDS and value:
            self.secrets.setdefault(value, f"{field} in the {where}")

    def find_in(self, contents: Mapping[str, bytes], *, pasted: bool = True) -> list[str]:
        """Which secrets are where. Without `pasted`, those that somebody put into a name do not count."""
        looked_for = [
            (what, form)
            for secret, what in self.secrets.items()
            if pasted or secret not in self.pasted
            for form in _forms(secret)
        ]
        return [
            f"{where} is in {name}" for name, text in contents.items() for where, form in looked_for if form in text
        ]


def _forms(secret: str) -> Iterator[bytes]:
    """As it is, encoded, and without what only separates its parts."""
    plain = secret.encode()
    yield plain
    yield base64.b64encode(plain)[: len(plain)]
    yield plain.hex().encode()
    if secret.startswith("eyJ"):
        yield secret.rpartition(".")[2].encode()
    elif "-" in secret:
        yield secret.replace("-", "").encode()


async def live(witness: Witness) -> bytes:
    """Logins, second factors, invitations, resets, keys, refusals; returns the audit log of it."""
    password = f"{secrets.token_hex(8)} Passphrase"
    ada = {"email": "ada@example.com", "password": password}
    await witness.do("POST", "/users", {**ada, "name": "Ada", "role": "admin"})
    tokens = await witness.do("POST", "/auth/login", ada, credential=NOBODY)
    old = {"refresh_token": tokens["refresh_token"]}
    tokens = await witness.do("POST", "/auth/refresh", old, credential=NOBODY)
    access = tokens["access_token"]
    await witness.do("GET", "/me", credential=access)
    assert (await witness.ask("GET", "/v1/models", credential=access)).status == 200
    password = await _enrol(witness, access, password)
    await _invite(witness)
    await _use_keys(witness)
    await _err(witness, password, access)
    await witness.do("POST", "/auth/logout", {"refresh_token": tokens["refresh_token"]}, credential=NOBODY)
    assert await witness.refused("POST", "/auth/refresh", old, credential=NOBODY) == 401
    logs = [await witness.ask("GET", f"{API}/audit/export{query}") for query in ("", "?installation=true")]
    assert all(verify(io.BytesIO(log.body)).records for log in logs)
    return b"".join(log.body for log in logs)


async def _enrol(witness: Witness, access: str, password: str) -> str:
    """A second factor, used with recovery codes (a code of the app works once), and a new password."""
    enrolment = await witness.do("POST", "/auth/mfa/enrol", {"current_password": password}, credential=access)
    seed = base64.b32decode(enrolment["secret"] + "=" * (-len(enrolment["secret"]) % 8))
    code = code_at(seed, int(time.time()) // STEP_S)
    codes = (await witness.do("POST", "/auth/mfa/confirm", {"code": code}, credential=access))["codes"]
    body = {"email": "ada@example.com", "password": password}
    challenge = (await witness.do("POST", "/auth/login", body, credential=NOBODY))["challenge"]
    wrong = {"challenge": challenge, "code": "000000"}
    assert await witness.refused("POST", "/auth/mfa/verify", wrong, credential=NOBODY) == 401
    second = await witness.do("POST", "/auth/mfa/verify", {"challenge": challenge, "code": codes[0]}, credential=NOBODY)
    changed = f"{secrets.token_hex(8)} Another"
    body = {"current_password": password, "new_password": changed}
    await witness.do("PUT", "/me/password", body, credential=second["access_token"])
    return changed


async def _invite(witness: Witness) -> None:
    invited = await witness.do("POST", "/invitations", {"email": "bob@example.com", "role": "viewer"})
    password = f"{secrets.token_hex(8)} Invited"
    body = {"token": invited["token"], "password": password, "name": "Bob"}
    account = await witness.do("POST", "/auth/redeem", body, credential=NOBODY)
    await witness.do("POST", "/auth/login", {"email": "bob@example.com", "password": password}, credential=NOBODY)
    await witness.do("POST", f"/users/{account['account_id']}/reset")
    await witness.do("POST", "/users", {"email": "eve@example.com", "name": "Eve", "role": "viewer"})


async def _use_keys(witness: Witness) -> None:
    created = await witness.do("POST", "/keys", {"name": "laptop"})
    assert (await witness.ask("GET", "/v1/models", credential=created["secret"])).status == 200
    # Somebody names a key after another one.
    pasted = generate_key()
    witness.secrets[pasted] = "key as a name"
    witness.pasted.add(pasted)
    await witness.do("PATCH", f"/keys/{created['key']['id']}", {"name": f"was {pasted}"})
    rotated = await witness.do("POST", f"/keys/{created['key']['id']}/rotate", {"overlap_s": 60})
    assert (await witness.ask("GET", "/v1/models", credential=rotated["secret"])).status == 200
    await witness.do("POST", f"/keys/{rotated['key']['id']}/revoke")


async def _err(witness: Witness, password: str, access: str) -> None:
    """What people do wrong with secrets."""
    wrong = f"{secrets.token_hex(8)} Typo"
    for email in ("ada@example.com", "nobody@example.com"):
        await witness.refused("POST", "/auth/login", {"email": email, "password": wrong}, credential=NOBODY)
    # The password where the e-mail belongs.
    witness.secrets[wrong] = "password as e-mail"
    await witness.refused("POST", "/auth/login", {"email": wrong, "password": password}, credential=NOBODY)
    unknown = generate_key()
    await witness.refused("GET", "/me", credential=unknown)
    await witness.refused("GET", "/me", credential=unknown[:-1] + "_")
    await witness.refused("GET", "/me", credential=access[:-20])
    assert (await witness.ask("GET", "/v1/models", credential=unknown)).status == 401
    # In the address, in a field that does not exist, of a wrong type, in a body that is no JSON.
    await witness.ask("GET", f"/v1/models?api_key={unknown}", credential=NOBODY)
    await witness.ask("GET", f"/v1/{unknown}", credential=NOBODY)
    await witness.ask("GET", f"{API}/me?access_token={access}", credential=NOBODY)
    await witness.refused("GET", f"/keys/{unknown}")
    await witness.refused("POST", "/keys", {"name": "x", "secret": unknown})
    await witness.refused("POST", "/auth/login", {"email": "ada@example.com", "password": [wrong]}, credential=NOBODY)
    await witness.refused("POST", "/auth/refresh", {"refresh_token": f" {unknown} "}, credential=NOBODY)
    await witness.refused("POST", "/auth/redeem", {"token": generate_key("hft_"), "password": wrong}, credential=NOBODY)
    async with await witness.node.connect() as wire:
        body = f'{{"email": "ada@example.com", "password": "{wrong}'.encode()
        answer = await wire.ask(request("POST", f"{API}/auth/login", body, None, JSON_TYPE))
    assert answer.status in (400, 422)
    witness.refusals.append(answer.body.decode())


async def test_no_secret_is_in_anything_that_was_written_or_said(chat_model: StoredModel, tmp_path: Path) -> None:
    with run_node(tmp_path / "data", chat_model, HELIXFLOW_LOG__LEVEL="debug") as node:
        witness = Witness(node)
        exported = await live(witness)
        shown = {f"arguments of {p.pid}": " ".join(command_of(p)).encode() for p in node.tree()}
        # With the write-ahead log, sockets and whatever goes away at the end.
        while_running = read_files(tmp_path)
    files = {**while_running, **{f"{name} (at the end)": content for name, content in read_files(tmp_path).items()}}
    databases = {name: content for name, content in files.items() if ".db" in name}
    others = {name: content for name, content in files.items() if ".db" not in name}
    # There was something to find.
    assert len(witness.secrets) > 25
    assert exported.count(b'"type":"record"') > 15
    assert b"Passphrase" not in exported
    assert databases
    assert any("data.err" in name and len(content) > 1000 for name, content in others.items())
    assert witness.find_in(databases, pasted=False) == []
    assert witness.find_in(others) == []
    assert witness.find_in({"the audit log": exported, **shown}) == []
    assert witness.find_in({f"refusal {text[:60]}": text.encode() for text in witness.refusals}) == []
