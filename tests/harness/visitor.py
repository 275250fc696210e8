"""Somebody with a credential at a running node: at its admin API, and at its models."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx2

from tests.harness.node import CHAT, CHAT_MODEL, Node

PASSWORD = "seven grey herons wade upstream"
# A change is in force everywhere after this time. Promised is one second; the machine of the tests may have other work.
# Without being told, a gateway would notice after a minute.
EFFECTIVE_S = 5.0
_TIMEOUT_S = 60.0


class Visitor:
    """`credential` is an API key or an access token, '' for none. `refresh_token` is that of a session.

    `client` sends what no method here would.
    """

    def __init__(self, client: httpx2.AsyncClient, credential: str = "", refresh_token: str = "") -> None:
        self.client = client
        self.credential = credential
        self.refresh_token = refresh_token

    def as_other(self, credential: str, refresh_token: str = "") -> "Visitor":
        """Somebody else at the same node."""
        return Visitor(self.client, credential, refresh_token)

    async def ask(self, method: str, path: str, body: Any = None, **headers: str) -> httpx2.Response:
        """Any path of the node. Headers are spelt with underscores."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.credential:
            given["authorization"] = f"Bearer {self.credential}"
        return await self.client.request(method, path, json=body, headers=given)

    async def admin(self, method: str, path: str, body: Any = None, **headers: str) -> httpx2.Response:
        """A path of the admin API."""
        return await self.ask(method, f"/api/v1{path}", body, **headers)

    async def make(self, path: str, body: Any, **headers: str) -> dict[str, Any]:
        """What a POST that must succeed answers."""
        answer = await self.admin("POST", path, body, **headers)
        assert answer.status_code in (200, 201), answer.text
        made: dict[str, Any] = answer.json()
        return made

    async def do(self, method: str, path: str, body: Any = None, **headers: str) -> None:
        """What must succeed."""
        answer = await self.admin(method, path, body, **headers)
        assert answer.is_success, answer.text

    async def chat(self, **headers: str) -> httpx2.Response:
        """Two tokens, the same each time."""
        messages = [{"role": "user", "content": "Say hello."}]
        body = {"model": CHAT_MODEL, "messages": messages, "max_tokens": 2, "temperature": 0}
        return await self.ask("POST", CHAT, body, **headers)

    async def models(self) -> httpx2.Response:
        return await self.ask("GET", "/v1/models")

    async def new_key(self, name: str = "a key", **fields: Any) -> "Visitor":
        """Whoever holds a new key of the caller's project, or as `fields` say."""
        return self.as_other((await self.make("/keys", {"name": name, **fields}))["secret"])

    async def new_user(self, email: str, role: str | None, **fields: Any) -> str:
        """The id of a new user with `PASSWORD`."""
        user = {"email": email, "name": email.partition("@")[0], "password": PASSWORD, "role": role, **fields}
        made: str = (await self.make("/users", user))["user"]["id"]
        return made

    async def sign_in(self, email: str, **fields: Any) -> "Visitor":
        tokens = await self.as_other("").make("/auth/login", {"email": email, "password": PASSWORD, **fields})
        return self.as_other(tokens["access_token"], tokens["refresh_token"])

    async def refresh(self) -> "Visitor":
        """The same session with new tokens."""
        tokens = await self.as_other("").make("/auth/refresh", {"refresh_token": self.refresh_token})
        return self.as_other(tokens["access_token"], tokens["refresh_token"])


def header_of(token: str) -> dict[str, Any]:
    """The header of an access token, as it says."""
    part = token.partition(".")[0]
    header: dict[str, Any] = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return header


@asynccontextmanager
async def visit(node: Node, credential: str | None = None, **options: Any) -> AsyncIterator[Visitor]:
    """At `node`, by default with its bootstrap key. `options` are httpx2's, such as another `base_url`."""
    where = {"base_url": f"http://127.0.0.1:{node.port}", "timeout": _TIMEOUT_S, **options}
    async with httpx2.AsyncClient(**where) as client:
        yield Visitor(client, node.key if credential is None else credential)


async def until_answered(
    visitor: Visitor, accept: Callable[[httpx2.Response], bool], limit_s: float = EFFECTIVE_S
) -> tuple[httpx2.Response, float]:
    """Asks for the models again and again until the answer is accepted; the answer, and how long that took, seconds.

    Fails when it takes longer than `limit_s`.
    """
    begun = time.monotonic()
    while True:
        answer = await visitor.models()
        took_s = time.monotonic() - begun
        assert took_s < limit_s, f"still {answer.status_code} after {took_s:.2f} s: {answer.text}"
        if accept(answer):
            return answer, took_s
        await asyncio.sleep(0.005)


async def until_refused(visitor: Visitor, status: int = 401, limit_s: float = EFFECTIVE_S) -> float:
    """How long it takes until the models are refused with this status, seconds."""
    _, took_s = await until_answered(visitor, lambda answer: answer.status_code == status, limit_s)
    return took_s
