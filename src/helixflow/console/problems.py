"""Errors as problem documents (RFC 9457), or in OpenAI's form on the paths of OpenAI's API."""

import json
import math
from collections.abc import Sequence
from typing import Any, Final

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.openai_errors import render_error
from helixflow.rpc.errors import describe

MEDIA_TYPE: Final = "application/problem+json"
# Of the paths whose clients are OpenAI's.
OPENAI_PREFIX: Final = "/v1/"
_MAX_NAME: Final = 200
_MAX_ERRORS: Final = 50
# RFC 6750, section 3.1: for a token that was sent and is wrong; one that is missing is no error. As the gateway does.
_INVALID_TOKEN: Final = 'Bearer error="invalid_token"'  # noqa: S105  (no secret)

log = structlog.get_logger("helixflow.console")


class FieldError(BaseModel):
    """What is wrong with one field."""

    param: str = Field(description="The field, parameter or header; inner ones with dots.", examples=["name"])
    message: str = Field(description="What is wrong with it.", examples=["Field required"])


class Problem(BaseModel):
    """An error (RFC 9457)."""

    type: str = Field(description="`urn:helixflow:error:` and the code.", examples=["urn:helixflow:error:not_found"])
    title: str = Field(description="The code in words.", examples=["Not found"])
    status: int = Field(description="The HTTP status.", examples=[404])
    detail: str = Field(description="What is wrong and what to do.", examples=["There is no such project."])
    code: str = Field(description="Stable; see docs/reference/errors.md.", examples=["not_found"])
    request_id: str = Field(description="Names this request in logs.", examples=["req_5c1a"])
    errors: list[FieldError] = Field(
        default=[], description="With status 422: every field that is wrong, where it is known."
    )


def request_id_of(scope: Any) -> str:
    """As the envelope noted it."""
    return str(scope.get("helixflow.request_id", ""))


def render(error: HelixError, scope: Any, errors: Sequence[FieldError] = ()) -> Response:
    """The response for `error` to the request of `scope`; `errors` default to the one field that it names."""
    if error.kind is ErrorKind.CLIENT_CLOSED:
        # Not the client has left, but the call to auth was cancelled on the way.
        error = HelixError(ErrorKind.UNAVAILABLE, "The service is restarting. Try again.", retry_after_s=1)
    status = error.traits.http
    if str(scope.get("path", "")).startswith(OPENAI_PREFIX):
        content, media_type = render_error(error), "application/json"
    else:
        content, media_type = _problem(error, request_id_of(scope), errors), MEDIA_TYPE
    headers = {}
    if status in (429, 503) or error.retry_after_s:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s or 1)))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.kind in (ErrorKind.BODY_TOO_LARGE, ErrorKind.REQUEST_TIMEOUT):
        # The rest of the body may still be on its way: the connection is not worth keeping.
        headers["connection"] = "close"
    return Response(content, status, headers, media_type)


def _problem(error: HelixError, request_id: str, errors: Sequence[FieldError]) -> bytes:
    document: dict[str, Any] = {
        "type": f"urn:helixflow:error:{error.code}",
        "title": error.code.replace("_", " ").capitalize(),
        "status": error.traits.http,
        "detail": error.message,
        "code": error.code,
        "request_id": request_id,
    }
    if not errors and error.param is not None:
        errors = [FieldError(param=error.param, message=error.message)]
    if errors:
        document["errors"] = [{"param": found.param, "message": found.message} for found in errors]
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "replace")


def add_problems(app: FastAPI) -> None:
    """Makes `app` answer with problem documents, also where FastAPI itself finds the fault."""
    app.add_exception_handler(HelixError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)


def _on_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HelixError)
    request_id = request_id_of(request.scope)
    if exc.traits.http >= 500:
        cause = describe(exc.__cause__) if exc.__cause__ is not None else None
        log.warning("admin_request.error", request_id=request_id, code=exc.code, cause=cause)
    response = render(exc, request.scope)
    if exc.kind is ErrorKind.INVALID_TOKEN and "authorization" in request.headers:
        response.headers["www-authenticate"] = _INVALID_TOKEN
    return response


def _on_validation(request: Request, exc: Exception) -> Response:
    """Names all fields. What was given for them is not repeated: it may be a password."""
    assert isinstance(exc, RequestValidationError)
    errors = [FieldError(param=_param_of(found["loc"]), message=_message_of(found)) for found in exc.errors()]
    first = errors[0]
    error = HelixError(ErrorKind.UNPROCESSABLE, f"{first.param}: {first.message}.", param=first.param)
    return render(error, request.scope, errors[:_MAX_ERRORS])


def _param_of(location: Sequence[Any]) -> str:
    parts = [str(part) for part in location[1:]] or ["body"]
    name = ".".join(parts)[:_MAX_NAME]
    return "".join(c if c.isprintable() else "?" for c in name)


def _message_of(found: dict[str, Any]) -> str:
    """pydantic's text, which names the rule and not the value; our own validators' without its prefix."""
    message = str(found["msg"]).removeprefix("Value error, ")
    return "there is no such field" if found["type"] == "extra_forbidden" else message


def _on_http(request: Request, exc: Exception) -> Response:
    """What Starlette's router and FastAPI's body parser raise."""
    assert isinstance(exc, HTTPException)
    scope = request.scope
    path = "".join(c if c.isprintable() else "?" for c in request.url.path[:256])
    if exc.status_code == 405:
        allowed = ", ".join(_methods_at(request.app, scope["path"]))
        error = HelixError(ErrorKind.METHOD_NOT_ALLOWED, f"{request.method} is not allowed on {path}; use {allowed}.")
        response = render(error, scope)
        response.headers["allow"] = allowed
        return response
    if exc.status_code == 404:
        message = f"There is nothing at {path}; see /api/v1/openapi.json."
        return render(HelixError(ErrorKind.NOT_FOUND, message), scope)
    return render(HelixError(ErrorKind.INVALID_REQUEST, "The request cannot be understood."), scope)


def _methods_at(app: FastAPI, path: str) -> list[str]:
    routes = (route for route in app.routes if isinstance(route, APIRoute) and route.path_regex.match(path))
    return sorted({method for route in routes for method in route.methods or ()})
