"""Errors as problem documents (RFC 9457), for what is under /api/v1."""

from typing import Final

import msgspec

from helixflow.core.errors import HelixError

MEDIA_TYPE: Final = b"application/problem+json"


def render_problem(error: HelixError, request_id: str) -> bytes:
    """The body of an error response. `type` and `code` are stable, `detail` is for people."""
    document = {
        "type": f"urn:helixflow:error:{error.code}",
        "title": error.code.replace("_", " ").capitalize(),
        "status": error.traits.http,
        "detail": error.message,
        "code": error.code,
        "request_id": request_id,
    }
    if error.param is not None:
        document["errors"] = [{"param": error.param, "message": error.message}]
    return msgspec.json.encode(document)
