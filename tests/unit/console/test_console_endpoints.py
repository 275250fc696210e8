"""Every RPC for callers has one endpoint, and the document says all of it."""

import re
from typing import Any

import pytest
from fastapi import FastAPI

from helixflow.console.app import create_app
from helixflow.console.binding import PREFIX, operation_id
from helixflow.console.document import build_document
from helixflow.console.endpoint import ADMIN, CONFIGURATION, FLEET, SESSIONS, USAGE, Endpoint
from helixflow.console.openai_usage import PATHS as OPENAI_PATHS
from helixflow.console.tags import TAGS
from helixflow.core.permissions import ROLE_PERMISSIONS, Permission
from helixflow.rpc.access import Level, access_of

ENDPOINTS = [endpoint for tag in TAGS for endpoint in tag.endpoints]
METHODS = [*ADMIN.values(), *SESSIONS.values(), *USAGE.values(), *FLEET.values(), *CONFIGURATION.values()]


class NoChannel:
    """What is bound but never called."""

    def unary_unary(self, *_: Any, **__: Any) -> None:
        return None

    unary_stream = unary_unary


@pytest.fixture(scope="module")
def app() -> FastAPI:
    channel: Any = NoChannel()
    return create_app(channel)


@pytest.fixture(scope="module")
def document(app: FastAPI) -> dict[str, Any]:
    return build_document(app)


def test_every_rpc_is_reached_through_exactly_one_endpoint_of_its_name() -> None:
    named = [e.method.full_name for e in ENDPOINTS if e.name == e.method.name]
    assert sorted(named) == sorted(method.full_name for method in METHODS)
    assert {e.name for e in ENDPOINTS if e.name != e.method.name} == {"ExplainRequest", "GetConfigurationRevision"}
    assert len({e.name for e in ENDPOINTS}) == len(ENDPOINTS)


def test_no_two_endpoints_share_verb_and_path() -> None:
    places = [(e.verb, re.sub(r"\{\w+\}", "{}", e.path)) for e in ENDPOINTS]
    assert len(set(places)) == len(places)


def test_a_literal_path_is_never_taken_for_an_id() -> None:
    literal = {(e.verb, e.path) for e in ENDPOINTS if "{" not in e.path}
    for e in ENDPOINTS:
        pattern = re.compile(re.sub(r"\{\w+\}", "[^/]+", e.path))
        assert not [path for verb, path in literal if verb == e.verb and path != e.path and pattern.fullmatch(path)]


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda e: e.name)
def test_an_endpoint_makes_the_request_of_its_rpc(endpoint: Endpoint) -> None:
    returned = endpoint.convert.__annotations__["return"]
    assert returned.DESCRIPTOR.full_name == endpoint.method.input_type.full_name


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda e: e.name)
def test_creations_are_what_may_be_repeated_with_a_key(endpoint: Endpoint) -> None:
    assert (endpoint.location is not None) == endpoint.access.idempotent


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda e: e.name)
def test_only_reading_is_a_get(endpoint: Endpoint) -> None:
    exported = endpoint.method.name == "ExportAuditLog"  # recorded, but changes nothing
    asked = endpoint.method.name == "PlanConfiguration"  # what is asked about is as large as what is applied
    assert (endpoint.verb == "GET") == ((not endpoint.access.writes and not asked) or exported)


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda e: e.name)
def test_the_document_shows_what_the_rpc_declares(document: dict[str, Any], endpoint: Endpoint) -> None:
    operation = document["paths"][PREFIX + endpoint.path][endpoint.verb.lower()]
    access = access_of(endpoint.method)
    permission = access.permission.value if access.permission else None
    assert operation["operationId"] == operation_id(endpoint.name)
    assert operation["x-permission"] == {"level": access.level.name.lower(), "permission": permission}
    assert operation["security"] == ([] if access.level is Level.PUBLIC else [{"bearer": []}])
    assert permission is None or f"`{permission}`" in operation["description"]
    assert operation["summary"] and operation["tags"]
    names = {parameter["name"] for parameter in operation.get("parameters", ())}
    fields = endpoint.method.input_type.fields_by_name
    assert ("limit" in names and "cursor" in names) == ("page_size" in fields)
    assert ("Idempotency-Key" in names) == access.idempotent
    assert ("If-Match" in names) == ("if_version" in fields and endpoint.method.name != "RevokeInvitation")
    responses = operation["responses"]
    assert str(endpoint.status) in responses
    assert {"400", "422", "500", "503"} <= responses.keys()
    # Ending a session that is none is no error.
    assert ("401" in responses) == (endpoint.method.name != "Logout")
    # Also signing in, in a place that is not one's own; and whoever is suspended.
    assert ("403" in responses) == (endpoint.method.name != "Logout")
    assert access.level is Level.PUBLIC or "404" in responses
    assert ("412" in responses) == ("If-Match" in names)


def test_every_field_and_parameter_is_described_with_an_example(document: dict[str, Any]) -> None:
    bare = []
    for name, schema in document["components"]["schemas"].items():
        assert schema["description"], name
        bare += [(name, field) for field, found in schema.get("properties", {}).items() if not _is_told(found)]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                if not _is_told({**parameter["schema"], **parameter}):
                    bare.append((path, parameter["name"]))
    assert bare == []


def _is_told(schema: dict[str, Any]) -> bool:
    if "$ref" in schema or "$ref" in schema.get("items", {}):
        return True
    speaks_for_itself = schema.get("type") == "boolean" or "enum" in schema or "const" in schema
    return bool(schema.get("description")) and (speaks_for_itself or bool(schema.get("examples")))


def test_no_parameter_may_be_null_and_no_reference_is_broken(document: dict[str, Any]) -> None:
    for operations in document["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                assert {"type": "null"} not in parameter["schema"].get("anyOf", ())
    for reference in _references(document):
        found: Any = document
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]
    assert "HTTPValidationError" not in document["components"]["schemas"]


def _references(value: Any) -> list[str]:
    if isinstance(value, list):
        return [found for inner in value for found in _references(inner)]
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [found for inner in value.values() for found in _references(inner)]
    return []


def test_scopes_are_those_that_a_role_may_hold_and_one_more(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    held = {permission.value for permission in ROLE_PERMISSIONS}
    assert set(schemas["NewRole"]["properties"]["permissions"]["items"]["enum"]) == held
    assert set(schemas["NewKey"]["properties"]["scopes"]["items"]["enum"]) == held | {Permission.METRICS_READ.value}


def test_no_page_of_others_is_served(app: FastAPI) -> None:
    paths = {getattr(route, "path", "") for route in app.routes} - OPENAI_PATHS.keys()
    assert all(path.startswith(f"{PREFIX}/") for path in paths), paths


def test_what_answers_get_answers_head_and_is_told_of_once(app: FastAPI, document: dict[str, Any]) -> None:
    paths: dict[str, set[str]] = {"GET": set(), "HEAD": set()}
    for route in app.routes:
        for method in paths.keys() & getattr(route, "methods", set()):
            paths[method].add(route.path)  # type: ignore[attr-defined]
    assert paths["GET"] == paths["HEAD"]
    assert all("head" not in operations for operations in document["paths"].values())
