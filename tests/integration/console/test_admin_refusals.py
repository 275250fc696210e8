"""Every error is a problem document with a status below 500 that names the fault and repeats nothing that was given."""

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest

from helixflow.console.app import create_app
from helixflow.console.server import AdminServer
from helixflow.core.errors import ErrorKind, ExitCode, HelixError, UserError
from tests.harness.scripted_auth import ScriptedAuth

JSON = {"content-type": "application/json"}


def problem(answer: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    """The document of an error, checked to be complete."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["cache-control"] == "no-store"
    document: dict[str, Any] = answer.json()
    assert document["type"] == f"urn:helixflow:error:{code}"
    assert document["code"] == code and document["status"] == status
    assert document["title"] and document["detail"]
    assert document["request_id"] == answer.headers["x-request-id"]
    return document


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b"{", JSON, 400, "invalid_json"),
        (b'{"name": "\xff"}', JSON, 400, "invalid_json"),
        (b'{"name": "\\ud800"}', JSON, 400, "invalid_json"),
        (b'{"name": NaN}', JSON, 400, "invalid_json"),
        (b'{"name": "a\\u0000b"}', JSON, 400, "invalid_value"),
        (b'{"a\\u0000": 1}', JSON, 400, "invalid_value"),
        (b'{"name": 1' + b"0" * 5000 + b"}", JSON, 400, "invalid_json"),
        (b"[" * 100_000, JSON, 400, "invalid_json"),
        (b'{"name":' * 70 + b"1" + b"}" * 70, JSON, 400, "invalid_json"),
        (b"[]", JSON, 422, "validation_failed"),
        (b'"text"', JSON, 422, "validation_failed"),
        (b"", JSON, 422, "validation_failed"),
        (b'{"name": "n"}', {"content-type": "text/plain"}, 415, "unsupported_media_type"),
        (b'{"name": "n"}', {}, 415, "unsupported_media_type"),
        (b'{"name": "n"}', {"content-type": "application/json; charset=utf-16"}, 415, "unsupported_media_type"),
        (b'{"name": "n"}', {**JSON, "content-encoding": "gzip"}, 415, "unsupported_media_type"),
        (b'{"name": "' + b"n" * 2**20 + b'"}', JSON, 413, "request_too_large"),
    ],
)
async def test_a_bad_body_is_refused(
    api: httpx2.AsyncClient, auth: ScriptedAuth, body: bytes, headers: dict[str, str], status: int, code: str
) -> None:
    problem(await api.post("/projects", content=body, headers=headers), status, code)
    assert auth.asked == []


async def test_a_body_in_chunks_is_bounded_too(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    async def endless() -> Any:
        while True:
            yield b" " * 65_536

    answer = await api.post("/projects", content=endless(), headers=JSON)
    problem(answer, 413, "request_too_large")
    assert answer.headers["connection"] == "close"
    problem(await api.post("/projects", content=iter_once(b'{"name": 1}'), headers=JSON), 422, "validation_failed")


async def iter_once(data: bytes) -> Any:
    yield data


async def test_all_fields_are_named_and_no_value_is_repeated(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    secret = "TOPSECRET"
    body = {"email": secret, "password": [secret], "name": "\x07" + secret, "role": f"{secret} x", "admin": secret}
    document = problem(await api.post("/users", json=body), 422, "validation_failed")
    assert {error["param"] for error in document["errors"]} == {"email", "password", "name", "role", "admin"}
    assert secret not in json.dumps(document)


@pytest.mark.parametrize("field", ["name", "email", "role", "scopes", "a" * 5000, "e\u0301\n\u202e"])
async def test_odd_names_of_fields_are_told_within_bounds(
    api: httpx2.AsyncClient, auth: ScriptedAuth, field: str
) -> None:
    answer = await api.post("/projects", json={field: {"x": 1}})
    document = problem(answer, 422, "validation_failed")
    assert len(answer.content) < 1000
    assert all(error["param"].isprintable() for error in document["errors"])


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (ErrorKind.NOT_FOUND, 404),
        (ErrorKind.CONFLICT, 409),
        (ErrorKind.PERMISSION_DENIED, 403),
        (ErrorKind.DEADLINE, 504),
    ],
)
async def test_errors_of_the_service_arrive_as_they_are(
    api: httpx2.AsyncClient, auth: ScriptedAuth, kind: ErrorKind, status: int
) -> None:
    auth.answers["GetKey"] = HelixError(kind, "As it is.")
    assert problem(await api.get("/keys/key_1"), status, kind.value)["detail"] == "As it is."


async def test_a_field_that_the_service_refuses_is_named(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    auth.answers["CreateProject"] = HelixError(ErrorKind.UNPROCESSABLE, "That name is odd.", param="name")
    document = problem(await api.post("/projects", json={"name": "n"}), 422, "validation_failed")
    assert document["errors"] == [{"param": "name", "message": "That name is odd."}]


async def test_headers_that_belong_to_errors(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    auth.answers["GetSelf"] = HelixError(ErrorKind.INVALID_TOKEN, "Sign in.")
    assert (await api.get("/me")).headers["www-authenticate"] == 'Bearer error="invalid_token"'
    auth.answers["GetSelf"] = HelixError(ErrorKind.INVALID_API_KEY, "Unknown.")
    assert (await api.get("/me")).headers["www-authenticate"] == "Bearer"
    auth.answers["Login"] = HelixError(ErrorKind.TOO_MANY_ATTEMPTS, "Wait.", retry_after_s=29.2)
    answer = await api.post("/auth/login", json={"email": "a", "password": "b"})
    problem(answer, 429, "too_many_attempts")
    assert answer.headers["retry-after"] == "30"


@pytest.mark.parametrize("credential", [b"Bearer \xe9", b"Bearer " + b"x" * 5000, b"", b"Bearer a\tb"])
async def test_a_credential_that_cannot_be_one(api: httpx2.AsyncClient, auth: ScriptedAuth, credential: bytes) -> None:
    problem(await api.get("/me", headers={b"authorization": credential}), 401, "invalid_token")
    assert auth.asked == []


async def test_without_a_credential_nothing_else_is_looked_at(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    del api.headers["authorization"]
    for answer in (await api.post("/projects", content=b"{", headers=JSON), await api.get("/keys?limit=x")):
        problem(answer, 401, "invalid_token")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert auth.asked == []


async def test_two_credentials_are_refused(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    answer = await api.get("/me", headers=[("authorization", "Bearer a"), ("authorization", "Bearer b")])
    problem(answer, 401, "invalid_token")


async def test_paths_and_methods(api: httpx2.AsyncClient) -> None:
    for path in ("/nothing", "/projects/", "/projects/a/b", "/projects/a%2Fb", "/", "/../../etc/passwd", "/docs"):
        problem(await api.get(path), 404, "not_found")
    answer = await api.put("/projects/proj_1", json={})
    problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "DELETE, GET, HEAD, PATCH"
    problem(await api.get("/projects/%00"), 422, "validation_failed")
    problem(await api.get("/projects/" + "x" * 65), 422, "validation_failed")
    problem(await api.get("/projects/a';DROP TABLE projects;--"), 422, "validation_failed")


async def test_a_fault_of_ours_says_nothing_but_the_request_id(
    api: httpx2.AsyncClient, auth: ScriptedAuth, caplog: pytest.LogCaptureFixture
) -> None:
    auth.answers["GetProject"] = RuntimeError("database password is hunter2")
    answer = await api.get("/projects/proj_1")
    problem(answer, 500, "internal_error")
    assert "hunter2" not in answer.text


async def test_an_auth_service_that_is_away(tmp_path: Path) -> None:
    channel = grpc.aio.insecure_channel(f"unix:{tmp_path / 'nobody.sock'}")
    server = AdminServer(create_app(channel), tmp_path / "admin.sock")
    await server.start()
    try:
        transport = httpx2.AsyncHTTPTransport(uds=str(tmp_path / "admin.sock"))
        async with httpx2.AsyncClient(
            transport=transport, base_url="http://admin/api/v1", headers={"authorization": "Bearer a"}
        ) as client:
            answer = await client.get("/me")
            problem(answer, 503, "service_unavailable")
            assert answer.headers["retry-after"] == "1"
    finally:
        await server.close()
        await channel.close()


async def test_more_requests_than_it_takes_are_told_to_come_back(tmp_path: Path, auth: ScriptedAuth) -> None:
    server = AdminServer(create_app(auth.channel, max_in_flight=1), tmp_path / "small.sock")
    await server.start()
    try:
        transport = httpx2.AsyncHTTPTransport(uds=str(tmp_path / "small.sock"))
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "small.sock"))
        writer.write(
            b"POST /api/v1/auth/logout HTTP/1.1\r\nhost: a\r\n"
            b"content-type: application/json\r\ncontent-length: 9\r\n\r\n{"
        )
        async with asyncio.timeout(60), httpx2.AsyncClient(transport=transport, base_url="http://a/api/v1") as client:
            while (answer := await client.get("/openapi.json")).status_code == 200:
                pass  # until the other request has been read
            problem(answer, 503, "overloaded")
            assert answer.headers["retry-after"] == "1"
            writer.write(b'"name":1')
            assert (await reader.readline()).startswith(b"HTTP/1.1 400 ")
        writer.close()
        await writer.wait_closed()
    finally:
        await server.close()


async def test_the_socket_is_its_owners_and_goes_away(tmp_path: Path, auth: ScriptedAuth) -> None:
    path = tmp_path / "admin.sock"
    server = AdminServer(create_app(auth.channel), path)
    await server.start()
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(UserError) as caught:
        await AdminServer(create_app(auth.channel), path).start()
    assert caught.value.exit_code is ExitCode.PORT_BUSY
    transport = httpx2.AsyncHTTPTransport(uds=str(path))
    async with httpx2.AsyncClient(transport=transport) as client:
        assert (await client.get("http://admin/api/v1/openapi.json")).status_code == 200
    await server.close()
    assert not path.exists()
    await server.close()
