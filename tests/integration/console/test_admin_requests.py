"""What the admin API makes of requests, and of the auth service's answers."""

from typing import Any
from urllib.parse import unquote

import httpx2
import pytest

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import admin_pb2, sessions_pb2
from tests.harness.scripted_auth import ScriptedAuth

PROJECT = admin_pb2.Project(
    id="proj_1",
    organisation_id="org_1",
    name="Ré\u200bsearch",
    created_at=1_763_837_100,
    updated_at=1_763_837_100,
    version=3,
)
KEY = admin_pb2.Key(
    id="key_1",
    name="laptop",
    hint="hfk_ab…yz",
    project_id="proj_1",
    scopes=["models:use"],
    created_at=1,
    updated_at=1,
    version=1,
    created_by="user_1",
)


async def test_what_says_who_asks_travels_with_the_rpc(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    auth.answers["GetSelf"] = sessions_pb2.Self(kind="account", id="user_1", name="Ada", organisation_id="org_1")
    answer = await api.get(
        "/me",
        headers={
            "authorization": "Bearer hfk_x",
            "x-request-id": "req_42",
            "x-forwarded-for": "2001:db8::7",
            "user-agent": ("Schlüssel/1 " + "é" * 300).encode("latin-1"),
        },
    )
    assert answer.status_code == 200
    metadata = auth.last.metadata
    assert metadata["authorization"] == "Bearer hfk_x"
    assert metadata["x-request-id"] == answer.headers["x-request-id"] == "req_42"
    assert metadata["x-forwarded-for"] == "2001:db8::7"
    assert metadata["x-client-software"].startswith("Schl%C3")
    assert 195 < len(metadata["x-client-software"]) <= 200
    assert set(unquote(metadata["x-client-software"].removeprefix("Schl%C3%BCssel/1 "))) == {"é"}
    assert 0 < auth.last.time_left_s < 11
    assert answer.json()["project_id"] is None and answer.json()["email"] is None


async def test_a_public_endpoint_passes_no_credential_on(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    auth.answers["Login"] = sessions_pb2.LoginResponse(challenge="hfc_1")
    body = {"email": "a@b.c", "password": "secret"}
    answer = await api.post(
        "/auth/login", json=body, headers={"authorization": "Bearer old", "x-forwarded-for": "junk"}
    )
    assert answer.status_code == 200 and answer.json() == {"challenge": "hfc_1"}
    assert "authorization" not in auth.last.metadata and "x-forwarded-for" not in auth.last.metadata
    assert auth.last.time_left_s > 11


async def test_login_gives_tokens(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    auth.answers["Login"] = sessions_pb2.LoginResponse(
        access_token="a.b.c", expires_in=3600, refresh_token="hfr_1", refresh_expires_in=86400, session_id="ses_1"
    )
    answer = await api.post("/auth/login", json={"email": "a@b.c", "password": "secret", "project_id": None})
    assert answer.json() == {
        "access_token": "a.b.c",
        "token_type": "Bearer",
        "expires_in": 3600,
        "refresh_token": "hfr_1",
        "refresh_expires_in": 86400,
        "session_id": "ses_1",
    }
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"


async def test_what_is_created_is_located(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    auth.answers["CreateProject"] = PROJECT
    answer = await api.post("/projects", json={"name": PROJECT.name}, headers={"idempotency-key": "once"})
    assert answer.status_code == 201
    assert answer.headers["location"] == "/api/v1/projects/proj_1"
    assert answer.headers["etag"] == '"3"'
    assert answer.json() == {
        "id": "proj_1",
        "organisation_id": "org_1",
        "name": "Ré\u200bsearch",
        "created_at": "2025-11-22T18:45:00Z",
        "updated_at": "2025-11-22T18:45:00Z",
        "version": 3,
    }
    assert auth.last.request.name == PROJECT.name
    assert auth.last.metadata["idempotency-key"] == "once"


async def test_an_owner_is_invited_to_an_organisation_that_is_not_the_callers(
    api: httpx2.AsyncClient, auth: ScriptedAuth
) -> None:
    invitation = admin_pb2.Invitation(
        id="inv_1", email="o@example.com", role="owner", created_at=1, expires_at=2, invited_by="user_1"
    )
    auth.answers["InviteOwner"] = admin_pb2.InviteUserResponse(invitation=invitation, token="hft_1")
    answer = await api.post("/organisations/org_2/owners", json={"owner_email": "o@example.com"})
    assert (answer.status_code, answer.headers["location"]) == (201, "/api/v1/invitations/inv_1")
    assert answer.json()["token"] == "hft_1" and answer.json()["invitation"]["project_id"] is None
    request = auth.last.request
    assert (request.organisation_id, request.owner_email) == ("org_2", "o@example.com")
    answer = await api.post("/organisations/org_2/owners", json={"owner_email": "o"})
    assert (answer.status_code, answer.json()["errors"][0]["param"]) == (422, "owner_email")


@pytest.mark.parametrize("key", ["", "with space", "x" * 256, "ü"])
async def test_a_bad_idempotency_key_is_refused(api: httpx2.AsyncClient, auth: ScriptedAuth, key: str) -> None:
    headers = {"idempotency-key": key.encode("latin-1")}
    answer = await api.post("/projects", json={"name": "n"}, headers=headers)  # type: ignore[arg-type]
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["param"] == "Idempotency-Key"
    assert auth.asked == []


async def test_pages(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    auth.answers["ListKeys"] = admin_pb2.ListKeysResponse(keys=[KEY], next_cursor="bmV4dA")
    answer = await api.get("/keys", params={"limit": 1, "cursor": "YQ", "project_id": "proj_1"})
    page = answer.json()
    assert page["next_cursor"] == "bmV4dA"
    assert page["data"][0]["expires_at"] is None and page["data"][0]["owner_id"] is None
    request = auth.last.request
    assert (request.page_size, request.cursor, request.project_id) == (1, "YQ", "proj_1")

    auth.answers["ListKeys"] = admin_pb2.ListKeysResponse()
    assert (await api.get("/keys")).json() == {"data": [], "next_cursor": None}
    assert auth.last.request.page_size == 20


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=101", "limit=x", "cursor=", "cursor=%00", "project=proj_1", "limit=1&limit=2"]
)
async def test_a_bad_query_is_refused(api: httpx2.AsyncClient, auth: ScriptedAuth, query: str) -> None:
    answer = await api.get(f"/keys?{query}")
    assert answer.status_code == 422, answer.text
    assert answer.json()["errors"][0]["param"] == query.partition("=")[0]
    assert auth.asked == []


async def test_versions(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    auth.answers["GetProject"] = auth.answers["UpdateProject"] = PROJECT
    assert (await api.get("/projects/proj_1")).headers["etag"] == '"3"'
    for names in ('"3"', 'W/"3"', '"1", "3"', "*"):
        answer = await api.get("/projects/proj_1", headers={"if-none-match": names})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", '"3"'), names
    assert (await api.get("/projects/proj_1", headers={"if-none-match": '"2"'})).status_code == 200

    for header, version in ({'"7"': 7, "*": 0}).items():
        await api.patch("/projects/proj_1", json={"name": "n"}, headers={"if-match": header})
        assert auth.last.request.if_version == version
    await api.patch("/projects/proj_1", json={"name": "n"})
    assert auth.last.request.if_version == 0
    for header in ('"0"', "7", 'W/"7"', '"x"', '"7", "8"', '"99999999999999999999"'):
        answer = await api.patch("/projects/proj_1", json={"name": "n"}, headers={"if-match": header})
        assert answer.status_code == 422 and answer.json()["errors"][0]["param"] == "If-Match", header

    auth.answers["DeleteProject"] = HelixError(ErrorKind.PRECONDITION_FAILED, "Changed since.")
    answer = await api.delete("/projects/proj_1", headers={"if-match": '"2"'})
    assert answer.status_code == 412 and answer.json()["code"] == "precondition_failed"


async def test_a_patch_changes_what_it_names_and_nothing_else(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    auth.answers["UpdateKey"] = KEY
    await api.patch("/keys/key_1", json={"models": [], "expires_at": None})
    request = auth.last.request
    assert request.HasField("models") and not request.HasField("scopes") and not request.HasField("name")
    assert request.HasField("expires_at") and request.expires_at == 0
    await api.patch("/keys/key_1", json={"expires_at": "2027-01-31T01:00:00.5+01:00", "scopes": ["models:use"]})
    assert auth.last.request.expires_at == 1_801_353_600
    assert list(auth.last.request.scopes.values) == ["models:use"]
    assert (await api.patch("/keys/key_1", json={"name": None})).status_code == 422


async def test_what_is_deleted_answers_without_a_body(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    answer = await api.delete("/members/user_1", params={"project_id": "proj_1"}, headers={"if-match": '"2"'})
    assert (answer.status_code, answer.content) == (204, b"")
    request = auth.last.request
    assert (request.user_id, request.project_id, request.if_version) == ("user_1", "proj_1", 2)


async def test_an_export_is_streamed_as_it_is(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    answers = [admin_pb2.ExportAuditLogResponse(lines=lines) for lines in (b'{"a":1}\n', b'{"b":2}\n{"c":3}\n')]
    auth.answers["ExportAuditLog"] = answers
    answer = await api.get("/audit/export", params={"since": "2026-01-01T00:00:00Z"})
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert answer.content == b'{"a":1}\n{"b":2}\n{"c":3}\n'
    assert auth.last.request.since == 1_767_225_600

    auth.answers["ExportAuditLog"] = HelixError(ErrorKind.PERMISSION_DENIED, "Not permitted.")
    assert (await api.get("/audit/export")).status_code == 403

    auth.answers["ExportAuditLog"] = [answers[0], HelixError(ErrorKind.UNAVAILABLE, "Gone.")]
    with pytest.raises(httpx2.RemoteProtocolError):
        await api.get("/audit/export")


@pytest.mark.parametrize("path", ["/projects/proj_1", "/projects", "/audit/export", "/openapi.json"])
async def test_head_tells_what_get_would_without_its_body(
    api: httpx2.AsyncClient, auth: ScriptedAuth, path: str
) -> None:
    auth.answers["GetProject"] = PROJECT
    auth.answers["ExportAuditLog"] = [admin_pb2.ExportAuditLogResponse(lines=b"{}\n")] * 2
    head, got = await api.head(path), await api.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == got.headers["content-type"]
    assert head.headers.get("etag") == got.headers.get("etag")
    if path != "/audit/export":  # where nobody knows how much it will be
        assert head.headers["content-length"] == got.headers["content-length"]


async def test_head_is_refused_as_get_is(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    auth.answers["GetProject"] = HelixError(ErrorKind.NOT_FOUND, "There is no such project.")
    auth.answers["ExportAuditLog"] = HelixError(ErrorKind.PERMISSION_DENIED, "Not permitted.")
    for path, status in (("/projects/proj_1", 404), ("/audit/export", 403), ("/projects?limit=x", 422)):
        answer = await api.head(path)
        assert (answer.status_code, answer.content) == (status, b"")
    assert (await api.head("/auth/login")).status_code == 405
    del api.headers["authorization"]
    assert (await api.head("/projects/proj_1")).status_code == 401


async def test_audit_records_show_what_was_and_became(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    record = admin_pb2.AuditRecord(
        sequence=1,
        at=1,
        actor_kind="account",
        action="update_project",
        outcome="done",
        after='{"name": "x"}',
        previous_hash=bytes(32),
        hash=b"\xff" * 32,
    )
    auth.answers["ListAuditRecords"] = admin_pb2.ListAuditRecordsResponse(records=[record])
    shown = (await api.get("/audit/records", params={"outcome": "done", "installation": "true"})).json()["data"][0]
    assert shown["before"] is None and shown["after"] == {"name": "x"}
    assert shown["previous_hash"] == "0" * 64 and shown["hash"] == "f" * 64
    assert auth.last.request.installation
    for query in ("outcome=other", "installation=yes", "since=yesterday", "since=1700000000"):
        assert (await api.get(f"/audit/records?{query}")).status_code == 422, query


@pytest.mark.parametrize(
    ("body", "revoke_others"),
    [(None, False), ({}, False), ({"revoke_others": False}, False), ({"revoke_others": True}, True)],
)
async def test_a_rotation_of_the_signing_key_revokes_others_only_when_told(
    api: httpx2.AsyncClient, auth: ScriptedAuth, body: dict[str, Any] | None, revoke_others: bool
) -> None:
    auth.answers["RotateSigningKey"] = admin_pb2.RotateSigningKeyResponse(kid="key-2", others_expire_at=1_800_000_000)
    answer = await api.post("/signing-keys/rotate", **({} if body is None else {"json": body}))
    assert answer.json() == {"kid": "key-2", "others_expire_at": "2027-01-15T08:00:00Z"}
    assert auth.last.request.revoke_others is revoke_others


@pytest.mark.parametrize("body", [{"revoke_others": "yes"}, {"revoke_others": 1}, {"revoke": True}, []])
async def test_a_rotation_of_the_signing_key_is_not_guessed(
    api: httpx2.AsyncClient, auth: ScriptedAuth, body: object
) -> None:
    answer = await api.post("/signing-keys/rotate", json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "validation_failed")
    assert not auth.asked


async def test_a_rotation_shows_both_keys(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    new = admin_pb2.Key(id="key_2", name="laptop", rotated_from="key_1", created_at=5, updated_at=5, version=1)
    auth.answers["RotateKey"] = admin_pb2.CreateKeyResponse(key=new, secret="hfk_new", replaced=KEY)
    answer = await api.post("/keys/key_1/rotate", json={"overlap_s": 0}, headers={"idempotency-key": "k"})
    assert answer.status_code == 201 and answer.headers["location"] == "/api/v1/keys/key_2"
    shown: dict[str, Any] = answer.json()
    assert (shown["secret"], shown["replaced"]["id"], shown["key"]["rotated_from"]) == ("hfk_new", "key_1", "key_1")
    await api.post("/keys/key_1/rotate", json={})
    assert auth.last.request.overlap_s == 86_400
