"""Who may do what on the OpenAI surface, by key and by token."""

import base64
from collections.abc import AsyncIterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers

from helixflow.core.permissions import Permission
from helixflow.rpc.generated.auth_v1 import identity_pb2 as pb
from helixflow.transport.testing import ScriptedUpstream, answer
from tests.harness.gateway import RunningGateway, provider, run_gateway
from tests.harness.tokens import change
from tests.harness.wire import Answer, request

CHAT = "/v1/chat/completions"
COMPLETION = (
    b'{"id":"x","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"message":{"role":"assistant",'
    b'"content":"Hi"},"finish_reason":"stop"}],"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}'
)
JSON = [("content-type", "application/json")]


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[RunningGateway]:
    script = [[answer(COMPLETION, headers=JSON)]] * 10
    async with (
        ScriptedUpstream(script) as upstream,
        run_gateway(
            tmp_path,
            {"m": [provider(upstream.base_url)], "secret-model": [provider("http://127.0.0.1:9")]},
            trusted_proxies=("127.0.0.2/32",),
        ) as gateway,
    ):
        yield gateway


async def chat(gateway: RunningGateway, credential: str | bytes, model: str = "m", **headers: str) -> Answer:
    body = b'{"model":"%b","messages":[{"role":"user","content":"Hi"}]}' % model.encode()
    return await ask(gateway, "POST", CHAT, credential, body, **headers)


async def ask(
    gateway: RunningGateway, method: str, path: str, credential: str | bytes, body: bytes | None = None, **headers: str
) -> Answer:
    key = credential.decode() if isinstance(credential, bytes) else credential
    async with await gateway.connect() as wire:
        return await wire.ask(request(method, path, body, key, headers))


def refusal(got: Answer) -> tuple[int, str, str | None]:
    return got.status, got.error["code"], got.error["param"]


async def test_a_token_is_as_good_as_a_key(gateway: RunningGateway) -> None:
    token = gateway.mint.token()
    assert (await chat(gateway, token)).json["choices"][0]["message"]["content"] == "Hi"
    async with await gateway.connect() as wire:
        for credential in (token.decode(), gateway.key, token.decode()):
            got = await wire.ask(request("GET", "/v1/models", key=credential))
            assert [model["id"] for model in got.json["data"]] == ["m", "secret-model"]


async def test_a_revoked_token_is_refused_on_a_connection_that_has_used_it(gateway: RunningGateway) -> None:
    token = gateway.mint.token().decode()
    body = b'{"model":"m","messages":[{"role":"user","content":"Hi"}]}'
    async with await gateway.connect() as wire:
        assert (await wire.ask(request("POST", CHAT, body, token))).status == 200
        gateway.tell(change(11, pb.CHANGE_KIND_SESSION, "ses_1"))
        got = await wire.ask(request("POST", CHAT, body, token))
    assert refusal(got) == (401, "invalid_token", None)
    assert got.headers["www-authenticate"] == 'Bearer error="invalid_token"'


async def test_without_the_permission_to_use_models_nothing_is_generated(gateway: RunningGateway) -> None:
    key = gateway.resolver.add("reader", permissions=frozenset({Permission.MODELS_READ}))
    got = await chat(gateway, key)
    assert refusal(got) == (403, "permission_denied", None)
    assert "models:use" in got.error["message"]
    assert refusal(await chat(gateway, gateway.mint.token(scope="keys:read")))[1] == "permission_denied"
    assert (await ask(gateway, "GET", "/v1/models", key)).status == 200


async def test_a_token_without_a_project_is_told_to_choose_one(gateway: RunningGateway) -> None:
    token = gateway.mint.token(project="")
    got = await chat(gateway, token)
    assert refusal(got) == (403, "permission_denied", None)
    assert "project" in got.error["message"]
    assert (await ask(gateway, "GET", "/v1/models", token)).status == 200


async def test_listing_models_needs_one_of_two_permissions(gateway: RunningGateway) -> None:
    for permissions, status in (({Permission.MODELS_USE}, 200), ({Permission.KEYS_READ}, 403), (set(), 403)):
        key = gateway.resolver.add("lister", permissions=frozenset(permissions))
        assert (await ask(gateway, "GET", "/v1/models", key)).status == status
        assert (await ask(gateway, "GET", "/v1/models/m", key)).status == status


async def test_a_restricted_key_sees_and_uses_its_models_only(gateway: RunningGateway) -> None:
    key = gateway.resolver.add("restricted", models=frozenset({"m"}))
    assert (await chat(gateway, key)).status == 200
    assert refusal(await chat(gateway, key, "secret-model")) == (403, "permission_denied", "model")
    # Whether there is such a model is not told.
    assert refusal(await chat(gateway, key, "no-such-model")) == (403, "permission_denied", "model")
    listed = (await ask(gateway, "GET", "/v1/models", key)).json["data"]
    assert [model["id"] for model in listed] == ["m"]
    assert (await ask(gateway, "GET", "/v1/models/m", key)).status == 200
    hidden = await ask(gateway, "GET", "/v1/models/secret-model", key)
    missing = await ask(gateway, "GET", "/v1/models/secret-mode1", key)
    assert refusal(hidden) == refusal(missing) == (404, "model_not_found", "model")
    assert hidden.error["message"].replace("secret-model", "") == missing.error["message"].replace("secret-mode1", "")


async def test_a_key_works_from_its_networks_only(gateway: RunningGateway) -> None:
    home = gateway.resolver.add("home", networks=(ip_network("127.0.0.0/30"),))
    away = gateway.resolver.add("away", networks=(ip_network("192.0.2.0/24"),))
    nowhere = gateway.resolver.add("nowhere", networks=())
    assert (await chat(gateway, home)).status == 200
    for key in (away, nowhere):
        got = await chat(gateway, key)
        assert refusal(got) == (403, "permission_denied", None)
        assert "networks" in got.error["message"]
        assert (await ask(gateway, "GET", "/v1/models", key)).status == 403
    # The peer is no trusted proxy: what it says of others counts for nothing.
    assert (await chat(gateway, away, **{"x-forwarded-for": "192.0.2.7"})).status == 403


async def test_behind_a_trusted_proxy_the_forwarded_address_counts(tmp_path: Path) -> None:
    async with run_gateway(
        tmp_path, {"m": [provider("http://127.0.0.1:9")]}, trusted_proxies=("127.0.0.1/32",)
    ) as gateway:
        key = gateway.resolver.add("away", networks=(ip_network("192.0.2.0/24"),))
        for forwarded, status in (("192.0.2.7", 200), ("198.51.100.1, 192.0.2.7", 200), ("192.0.2.7, 1.1.1.1", 403)):
            got = await ask(gateway, "GET", "/v1/models", key, **{"x-forwarded-for": forwarded})
            assert got.status == status
        # A scrape through the proxy comes from elsewhere, although the proxy does not.
        assert (await ask(gateway, "GET", "/metrics", gateway.key, **{"x-forwarded-for": "192.0.2.7"})).status == 403
        scraper = gateway.resolver.add("scraper", permissions=frozenset({Permission.METRICS_READ}))
        assert (await ask(gateway, "GET", "/metrics", scraper, **{"x-forwarded-for": "192.0.2.7"})).status == 200
        assert (await gateway.ask("GET", "/metrics")).status == 200
        # As auth makes them for operators, and for others.
        for scope, status in (("models:use metrics:read", 200), ("models:use", 403)):
            got = await ask(
                gateway, "GET", "/metrics", gateway.mint.token(scope=scope), **{"x-forwarded-for": "192.0.2.7"}
            )
            assert got.status == status


async def test_a_restricted_key_is_judged_on_every_request_of_a_connection(gateway: RunningGateway) -> None:
    away = gateway.resolver.add("away", networks=(ip_network("192.0.2.0/24"),))
    async with await gateway.connect() as wire:
        for _ in range(2):
            assert (await wire.ask(request("POST", CHAT, b"{}", away))).status == 403


async def test_without_word_from_auth_tokens_cannot_be_judged(gateway: RunningGateway) -> None:
    token = gateway.mint.token()
    gateway.gateway._changes.vouched_until = float("-inf")
    got = await chat(gateway, token)
    assert refusal(got) == (503, "service_unavailable", None)
    assert got.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    "token", ["eyJ", "eyJhbGciOiJub25lIn0.e30.", "eyJ" + "A" * 20_000, "eyJhbGciOiJSUzI1NiJ9.e30.AAAA", "eyJ\xe9"]
)
async def test_what_only_looks_like_a_token_is_refused(gateway: RunningGateway, token: str) -> None:
    async with await gateway.connect() as wire:
        wire.send(f"GET /v1/models HTTP/1.1\r\nhost: t\r\nauthorization: Bearer {token}\r\n\r\n".encode("latin-1"))
        assert refusal(await wire.read()) == (401, "invalid_token", None)


async def test_the_signing_keys_are_public(gateway: RunningGateway) -> None:
    async with await gateway.connect() as wire:
        got = await wire.ask(request("GET", "/.well-known/jwks.json"))
        assert got.headers["content-type"] == "application/json"
        assert got.headers["cache-control"] == "public, max-age=5"
        (key,) = got.json["keys"]
        head = await wire.ask(request("HEAD", "/.well-known/jwks.json"), head_only=True)
        assert head.headers["content-length"] == got.headers["content-length"]
        assert (await wire.ask(request("POST", "/.well-known/jwks.json", b"{}"))).status == 405
    assert {name: key[name] for name in ("kty", "use", "alg", "kid")} == {
        "kty": "RSA", "use": "sig", "alg": "RS256", "kid": "key-1"
    }  # fmt: skip
    public = RSAPublicNumbers(_number(key["e"]), _number(key["n"]))
    assert public == gateway.mint.key.public_key().public_numbers()


async def test_nobody_keeps_that_there_is_no_signing_key_yet(gateway: RunningGateway) -> None:
    gateway.gateway._changes.signing_keys = ()
    got = await gateway.ask("GET", "/.well-known/jwks.json")
    assert (got.json, got.headers["cache-control"]) == ({"keys": []}, "no-store")


async def test_the_signing_keys_are_unavailable_until_they_are_known(gateway: RunningGateway) -> None:
    gateway.gateway._changes.has_watched = False
    assert (await gateway.ask("GET", "/.well-known/jwks.json")).status == 503


def _number(text: Any) -> int:
    assert "=" not in text
    return int.from_bytes(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
