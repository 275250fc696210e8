"""The admin API of a real node: repeated requests, versions, borders between organisations, errors, the audit log."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.harness.node import Node
from tests.harness.visitor import PASSWORD, visit

DOMAIN = "admin.example"


async def test_a_request_that_is_repeated_is_done_once(node: Node) -> None:
    async with visit(node) as operator:
        body = {"name": "once"}
        answers = await asyncio.gather(
            *(operator.admin("POST", "/keys", body, idempotency_key="one-key") for _ in range(8))
        )
        assert {answer.status_code for answer in answers} == {201}
        assert len({answer.text for answer in answers}) == 1, "the secret too"
        later = await operator.admin("POST", "/keys", body, idempotency_key="one-key")
        assert later.text == answers[0].text
        other = await operator.admin("POST", "/keys", {"name": "twice"}, idempotency_key="one-key")
        assert_problem(other, 422, "idempotency_key_reused")
        elsewhere = await operator.admin("POST", "/projects", body, idempotency_key="one-key")
        assert_problem(elsewhere, 422, "idempotency_key_reused")
        listed = (await operator.admin("GET", "/keys?limit=100")).json()["data"]
        assert [key["name"] for key in listed].count("once") == 1
        assert "twice" not in [key["name"] for key in listed]


async def test_an_idempotency_key_is_its_callers(node: Node) -> None:
    async with visit(node) as operator:
        callers = [
            await operator.new_key(f"caller {number}", scopes=["keys:create", "models:read"]) for number in (1, 2)
        ]
        body = {"name": "made", "scopes": ["models:read"]}
        made = [await caller.make("/keys", body, idempotency_key="shared") for caller in callers]
        assert made[0]["key"]["id"] != made[1]["key"]["id"]


async def test_an_update_of_what_somebody_else_has_changed_is_refused(node: Node) -> None:
    async with visit(node) as operator:
        created = await operator.admin("POST", "/projects", {"name": "contested"})
        path = created.headers["location"].removeprefix("/api/v1")
        etag = created.headers["etag"]
        answers = await asyncio.gather(
            *(operator.admin("PATCH", path, {"name": f"by {n}"}, if_match=etag) for n in range(5))
        )
        assert sorted(answer.status_code for answer in answers) == [200] + [412] * 4
        assert_problem(next(a for a in answers if a.status_code == 412), 412, "precondition_failed")
        current = await operator.admin("GET", path)
        assert current.headers["etag"] != etag
        unchanged = await operator.admin("GET", path, if_none_match=current.headers["etag"])
        assert (unchanged.status_code, unchanged.content) == (304, b"")
        assert (await operator.admin("DELETE", path, if_match=etag)).status_code == 412
        assert (await operator.admin("DELETE", path, if_match=current.headers["etag"])).status_code == 204
        assert_problem(await operator.admin("GET", path), 404, "not_found")


async def test_another_organisation_is_as_if_it_were_not_there(node: Node) -> None:
    async with visit(node) as operator:
        email = f"owner@other.{DOMAIN}"
        made = await operator.make("/organisations", {"name": "Other", "owner_email": email})
        redeemed = await operator.as_other("").make(
            "/auth/redeem", {"token": made["invitation_token"], "password": PASSWORD, "name": "Olga"}
        )
        assert redeemed["email"] == email
        owner = await operator.sign_in(email)
        assert (await owner.chat()).status_code == 200
        project = await operator.make("/projects", {"name": "ours"})
        key = await operator.make("/keys", {"name": "ours"})
        role = await operator.make("/roles", {"name": "ours", "permissions": ["keys:read"]})
        robot = await operator.make("/service-accounts", {"name": "ours", "role": "viewer"})
        user_id = await operator.new_user(f"ours@{DOMAIN}", "viewer")
        invitation = await operator.make("/invitations", {"email": f"invited@{DOMAIN}", "role": "viewer"})
        hidden: list[tuple[str, str, dict[str, Any] | None]] = [
            ("GET", f"/projects/{project['id']}", None),
            ("PATCH", f"/projects/{project['id']}", {"name": "theirs"}),
            ("DELETE", f"/projects/{project['id']}", None),
            ("GET", f"/keys/{key['key']['id']}", None),
            ("POST", f"/keys/{key['key']['id']}/revoke", None),
            ("POST", f"/keys/{key['key']['id']}/rotate", {}),
            ("POST", "/keys", {"name": "theirs", "project_id": project["id"]}),
            ("PATCH", f"/roles/{role['id']}", {"permissions": []}),
            ("DELETE", f"/service-accounts/{robot['id']}", None),
            ("GET", f"/users/{user_id}", None),
            ("POST", f"/users/{user_id}/suspend", None),
            ("PUT", f"/members/{user_id}?project_id={project['id']}", {"role": "owner"}),
            ("DELETE", f"/invitations/{invitation['invitation']['id']}", None),
            ("GET", "/organisations/org_default", None),
            ("DELETE", "/organisations/org_default", None),
            ("GET", "/service-accounts/sa_none", None),
        ]
        for method, path, body in hidden:
            answer = await owner.admin(method, path, body)
            assert_problem(answer, 404, "not_found")
        for path in ("/organisations", "/audit/records?installation=true"):
            assert_problem(await owner.admin("GET", path), 403, "permission_denied")
        for path in ("/users", "/projects", "/keys", "/roles", "/service-accounts", "/invitations", "/members"):
            seen = (await owner.admin("GET", path)).text
            assert "ours" not in seen and DOMAIN not in seen.replace(email, ""), path
        records = (await owner.admin("GET", "/audit/records?limit=100")).json()["data"]
        assert records and {record["organisation_id"] for record in records} == {made["organisation"]["id"]}
        assert "org_default" not in [
            o["organisation_id"] for o in (await owner.admin("GET", "/me")).json()["organisations"]
        ]
        assert (await operator.admin("GET", f"/projects/{project['id']}")).json()["name"] == "ours"


def assert_problem(answer: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    """That it is a problem document as every error here, and nothing else."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert set(problem) - {"errors"} == {"type", "title", "status", "detail", "code", "request_id"}
    assert (problem["status"], problem["code"]) == (status, code)
    assert problem["type"] == f"urn:helixflow:error:{code}"
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert problem["detail"] and problem["title"]
    return problem


async def test_errors_are_problem_documents(node: Node) -> None:
    async with visit(node) as operator:
        nobody = operator.as_other("")
        for answer in (
            await nobody.admin("GET", "/users"),
            await operator.as_other("hfk_wrong").admin("GET", "/users"),
        ):
            assert answer.status_code == 401
            assert_problem(answer, 401, answer.json()["code"])
            assert answer.headers["www-authenticate"] == "Bearer"
        viewer_id = await operator.new_user(f"viewer@{DOMAIN}", "viewer")
        viewer = await operator.sign_in(f"viewer@{DOMAIN}")
        assert_problem(await viewer.admin("POST", "/projects", {"name": "n"}), 403, "permission_denied")
        assert_problem(await operator.admin("GET", "/users/user_none"), 404, "not_found")
        assert_problem(await operator.admin("GET", "/nowhere"), 404, "not_found")
        wrong_method = await operator.admin("PUT", "/users")
        assert_problem(wrong_method, 405, "method_not_allowed")
        assert wrong_method.headers["allow"] == "GET, HEAD, POST"
        taken = await operator.admin("POST", "/users", {"email": f"VIEWER@{DOMAIN}", "name": "V"})
        assert_problem(taken, 409, "conflict")
        assert viewer_id not in taken.text
        too_large = await operator.admin("POST", "/projects", {"name": "x" * 2**20})
        assert_problem(too_large, 413, "request_too_large")
        for body, param in (
            ({"name": ""}, "name"),
            ({"nmae": "n"}, "name"),
            ({"name": "n", "owner": "me"}, "owner"),
            ({"name": 5}, "name"),
        ):
            problem = assert_problem(await operator.admin("POST", "/projects", body), 422, "validation_failed")
            assert param in [error["param"] for error in problem["errors"]]
        login = await nobody.admin("POST", "/auth/login", {"email": f"nobody@{DOMAIN}", "password": PASSWORD})
        unknown = assert_problem(login, 401, "invalid_credentials")
        login = await nobody.admin("POST", "/auth/login", {"email": f"viewer@{DOMAIN}", "password": "wrong"})
        wrong = assert_problem(login, 401, "invalid_credentials")
        assert unknown["detail"] == wrong["detail"]


async def test_what_is_no_json_is_refused_before_anything_looks_into_it(node: Node) -> None:
    async with visit(node) as operator:
        headers = {"authorization": f"Bearer {operator.credential}", "content-type": "application/json"}
        for content, status, code in (
            (b'{"name": "n"', 400, "invalid_json"),
            (b"[" * 100_000, 400, "invalid_json"),
            (b'{"name": "\xff"}', 400, "invalid_json"),
            (b'{"name": "a\\u0000b"}', 400, "invalid_value"),
        ):
            answer = await operator.client.post("/api/v1/projects", content=content, headers=headers)
            assert_problem(answer, status, code)
        answer = await operator.client.post(
            "/api/v1/projects", content=b"name=n", headers={**headers, "content-type": "x/y"}
        )
        assert_problem(answer, 415, "unsupported_media_type")


@pytest.fixture
async def export(node: Node, tmp_path: Path) -> Path:
    """The audit log of an organisation in which a few things were done, as a file."""
    async with visit(node) as operator:
        for number in range(3):
            await operator.make("/keys", {"name": f"audited {number}"})
        answer = await operator.admin("GET", "/audit/export")
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/x-ndjson"
        file = tmp_path / "audit.jsonl"
        file.write_bytes(answer.content)
        assert operator.credential not in answer.text
    return file


async def verify(node: Node, file: Path) -> tuple[int, dict[str, Any]]:
    done = await asyncio.to_thread(node.run, "audit", "verify", str(file), "--json")
    return done.returncode, json.loads(done.stdout)


async def test_an_export_of_the_audit_log_verifies_offline(node: Node, export: Path) -> None:
    code, said = await verify(node, export)
    assert (code, said["valid"], said["organisation_id"]) == (0, True, "org_default")
    lines = export.read_text().splitlines()
    assert said["records"] == sum('"sequence"' in line and '"actor_kind"' in line for line in lines)


async def test_the_first_bad_record_of_a_tampered_export_is_named(node: Node, export: Path) -> None:
    lines = export.read_bytes().splitlines(keepends=True)
    at, record = [(at, json.loads(line)) for at, line in enumerate(lines) if b"audited 1" in line][-1]
    export.write_bytes(b"".join([*lines[:at], lines[at].replace(b"audited 1", b"audited 9"), *lines[at + 1 :]]))
    code, said = await verify(node, export)
    assert (code, said["valid"], said["sequence"], said["line"]) == (1, False, record["sequence"], at + 1)
    export.write_bytes(b"".join([*lines[:at], *lines[at + 1 :]]))
    code, said = await verify(node, export)
    assert (code, said["sequence"]) == (1, record["sequence"])
    export.write_bytes(b"".join(lines[:-1]))
    assert (await verify(node, export))[0] == 1, "cut off at the end"
