"""The OpenAPI document: what FastAPI knows of the routes, and what follows from the RPCs behind them."""

import http
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from helixflow import __version__
from helixflow.console.binding import NDJSON, PREFIX
from helixflow.console.endpoint import Endpoint
from helixflow.console.problems import MEDIA_TYPE, FieldError, Problem
from helixflow.console.tags import TAGS
from helixflow.rpc.access import Level

_SECURITY: Final = "bearer"
_DESCRIPTION: Final = """\
Administration of HelixFlow: organisations, projects, users, roles, service accounts, API keys, audit log.

Credentials are access tokens (`POST /api/v1/auth/login`) and API keys, as `Authorization: Bearer …`. A caller acts in
one organisation, that of the credential; what belongs to another one is not found. Times are RFC 3339 in UTC. Lists
are pages: give `next_cursor` back as `cursor`. Resources have a version, their `ETag`; with `If-Match` a change is made
only to that version. With an `Idempotency-Key` a repeated creation gives the first one's answer. Errors are problem
documents (RFC 9457) with a stable `code`. Unknown fields and parameters are refused.
"""
_WHERE: Final = {
    Level.PUBLIC: "Needs no credential.",
    Level.SELF: "Needs any valid credential.",
    Level.PROJECT: "Needs `{}` in the project that it is about, or in the organisation.",
    Level.ORGANISATION: "Needs `{}` in the organisation.",
    Level.INSTALLATION: "Needs `{}`, which operators of the installation have.",
}
_ERRORS: Final = {
    400: "The request cannot be understood: not HTTP or JSON as it should be.",
    401: "The credential is missing or not valid.",
    403: "The caller may not do that.",
    404: "There is no such thing, or it belongs to another organisation.",
    408: "The request body did not come in time.",
    409: "It conflicts with what there is.",
    412: "It has been changed since: `If-Match` names another version.",
    413: "The request body is larger than 1 MiB.",
    415: "The request body is not sent as `application/json`.",
    422: "A field or parameter is wrong, which `errors` names; or the idempotency key was used for another request.",
    429: "Too many attempts; `Retry-After` says when to try again.",
    500: "The server failed.",
    503: "The service cannot be reached or is overloaded; try again.",
    504: "The service did not answer in time.",
}
_ETAG: Final = {"description": "The version.", "schema": {"type": "string", "examples": ['"3"']}}
_LOCATION: Final = {"description": "Path of what was made.", "schema": {"type": "string", "format": "uri-reference"}}
_REQUEST_ID: Final = {"description": "Names this request in logs.", "schema": {"type": "string"}}


def build_document(app: FastAPI) -> dict[str, Any]:
    """The whole document for the routes of `app`, as JSON-compatible values."""
    document = get_openapi(
        title="HelixFlow admin API",
        version=__version__,
        openapi_version="3.1.0",
        description=_DESCRIPTION,
        routes=app.routes,
        tags=[{"name": tag.name, "description": tag.description} for tag in TAGS],
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        servers=[{"url": "/", "description": "Any gateway of the installation."}],
    )
    for tag in TAGS:
        for endpoint in tag.endpoints:
            _complete(document["paths"][PREFIX + endpoint.path][endpoint.verb.lower()], endpoint)
    components = document["components"]
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    _, problem = models_json_schema(
        [(Problem, "serialization"), (FieldError, "serialization")], ref_template="#/components/schemas/{model}"
    )
    components["schemas"].update(problem["$defs"])
    components["responses"] = {_error_name(status): _error(status) for status in _ERRORS}
    components["securitySchemes"] = {
        _SECURITY: {"type": "http", "scheme": "bearer", "description": "An access token or an API key."}
    }
    return document


def _complete(operation: dict[str, Any], endpoint: Endpoint) -> None:
    """Adds to FastAPI's description of one operation."""
    access = endpoint.access
    permission = access.permission.value if access.permission is not None else None
    operation["x-permission"] = {"level": access.level.name.lower(), "permission": permission}
    operation["security"] = [] if access.level is Level.PUBLIC else [{_SECURITY: []}]
    needs = _WHERE[access.level].format(permission)
    operation["description"] = f"{operation['description']}\n\n{needs}"
    for parameter in operation.get("parameters", ()):
        parameter["schema"] = _without_null(parameter["schema"])
    responses = operation["responses"]
    responses.pop("422", None)
    success = responses[str(endpoint.status)]
    success["description"] = "Done." if endpoint.status == 204 else "Made." if endpoint.status == 201 else "The answer."
    headers = success["headers"] = {"X-Request-Id": _REQUEST_ID}
    if endpoint.shows_version:
        headers["ETag"] = _ETAG
    if endpoint.location is not None:
        headers["Location"] = _LOCATION
    if endpoint.method.server_streaming:
        success["content"] = {NDJSON: {"schema": {"type": "string"}}}
    if endpoint.media_type is not None:
        success["content"][endpoint.media_type] = {"schema": {"type": "string"}}
    if endpoint.cacheable:
        responses["304"] = {"description": "It is what `If-None-Match` names.", "headers": {"ETag": _ETAG}}
    for status in _statuses(endpoint, has_body="requestBody" in operation):
        responses[str(status)] = {"$ref": f"#/components/responses/{_error_name(status)}"}


def _statuses(endpoint: Endpoint, *, has_body: bool) -> list[int]:
    """The errors that this endpoint may answer with."""
    found = {400, 422, 429, 500, 503, 504} | endpoint.errors
    if endpoint.access.level is not Level.PUBLIC:
        found |= {401, 403, 404}
        if endpoint.access.writes:
            found |= {409}
    if endpoint.conditional:
        found |= {412}
    if has_body:
        found |= {408, 413, 415}
    return sorted(found)


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A parameter that is not given is absent: there is no null in a query or header."""
    branches = [branch for branch in schema.get("anyOf", ()) if branch != {"type": "null"}]
    if len(branches) != 1:
        return schema
    return {**branches[0], **{name: value for name, value in schema.items() if name != "anyOf"}}


def _error_name(status: int) -> str:
    return http.HTTPStatus(status).phrase.replace(" ", "").replace("-", "")


def _error(status: int) -> dict[str, Any]:
    headers: dict[str, Any] = {"X-Request-Id": _REQUEST_ID}
    if status == 401:
        headers["WWW-Authenticate"] = {
            "description": '`Bearer`; `Bearer error="invalid_token"` for a token that is wrong, expired or void.',
            "schema": {"type": "string"},
        }
    if status in (429, 503):
        headers["Retry-After"] = {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {"description": _ERRORS[status], "headers": headers, "content": content}
