"""OpenAI's form of errors, as a body and as an event in a stream."""

import msgspec

from helixflow.core.errors import ErrorKind, HelixError


def render_error(error: HelixError) -> bytes:
    """`{"error": {message, type, param, code}}`; `param` and `code` are always present."""
    return msgspec.json.encode({"error": _error(error)})


def render_error_event(error: HelixError) -> bytes:
    """One SSE event for a failure after the first byte; the stream ends after it, without `[DONE]`."""
    return b"data: " + render_error(error) + b"\n\n"


def _error(error: HelixError) -> dict[str, str | None]:
    return {
        "message": error.message,
        "type": error.traits.openai_type,
        "param": error.param,
        # The API reference has no code for the plainest kind; one that an upstream gave is kept.
        "code": None if error.code == ErrorKind.INVALID_REQUEST.value else error.code,
    }
