"""The one exception type and the one table of errors.

Rooms raise kinds; `gateway/surfaces` and `rpc` render them; nothing else knows about wire formats.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Final


class ErrorKind(Enum):
    """What went wrong, independent of any wire format. The value is the stable `code` that clients see."""

    INVALID_REQUEST = "invalid_request"
    INVALID_JSON = "invalid_json"
    INVALID_VALUE = "invalid_value"
    UNSUPPORTED = "unsupported_parameter"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    CONTENT_FILTERED = "content_filter"
    INVALID_API_KEY = "invalid_api_key"
    INVALID_TOKEN = "invalid_token"  # noqa: S105  (no secret)
    INVALID_CREDENTIALS = "invalid_credentials"
    PERMISSION_DENIED = "permission_denied"
    NOT_FOUND = "not_found"
    MODEL_NOT_FOUND = "model_not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    REQUEST_TIMEOUT = "request_timeout"
    CONFLICT = "conflict"
    PRECONDITION_FAILED = "precondition_failed"
    UNPROCESSABLE = "validation_failed"
    BODY_TOO_LARGE = "request_too_large"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    RATE_LIMITED = "rate_limit_exceeded"
    TOO_MANY_ATTEMPTS = "too_many_attempts"
    INSUFFICIENT_QUOTA = "insufficient_quota"
    CLIENT_CLOSED = "client_closed_request"
    INTERNAL = "internal_error"
    UPSTREAM_INVALID = "upstream_invalid_response"
    UPSTREAM_UNAVAILABLE = "upstream_unavailable"
    OVERLOADED = "overloaded"
    LOADING = "model_loading"
    NOT_SERVED = "model_not_served"
    SHUTTING_DOWN = "shutting_down"
    UNAVAILABLE = "service_unavailable"
    STORAGE_FULL = "storage_full"
    DEADLINE = "deadline_exceeded"


@dataclass(frozen=True, slots=True)
class ErrorTraits:
    """How one kind looks on each wire, and whether the same request may succeed later.

    `grpc` is the name of a `grpc.StatusCode`.
    """

    http: int
    openai_type: str
    anthropic_type: str
    grpc: str
    retryable: bool = False


_INVALID: Final = ("invalid_request_error", "invalid_request_error", "INVALID_ARGUMENT")
_UNAUTHENTICATED: Final = ("authentication_error", "authentication_error", "UNAUTHENTICATED")
_LIMITED: Final = ("rate_limit_error", "rate_limit_error", "RESOURCE_EXHAUSTED")

ERRORS: Final[dict[ErrorKind, ErrorTraits]] = {
    ErrorKind.INVALID_REQUEST: ErrorTraits(400, *_INVALID),
    ErrorKind.INVALID_JSON: ErrorTraits(400, *_INVALID),
    ErrorKind.INVALID_VALUE: ErrorTraits(400, *_INVALID),
    ErrorKind.UNSUPPORTED: ErrorTraits(400, *_INVALID),
    ErrorKind.CONTEXT_LENGTH_EXCEEDED: ErrorTraits(400, *_INVALID),
    ErrorKind.CONTENT_FILTERED: ErrorTraits(400, *_INVALID),
    ErrorKind.INVALID_API_KEY: ErrorTraits(401, *_UNAUTHENTICATED),
    ErrorKind.INVALID_TOKEN: ErrorTraits(401, *_UNAUTHENTICATED),
    ErrorKind.INVALID_CREDENTIALS: ErrorTraits(401, *_UNAUTHENTICATED),
    ErrorKind.PERMISSION_DENIED: ErrorTraits(403, "permission_error", "permission_error", "PERMISSION_DENIED"),
    ErrorKind.NOT_FOUND: ErrorTraits(404, "invalid_request_error", "not_found_error", "NOT_FOUND"),
    ErrorKind.MODEL_NOT_FOUND: ErrorTraits(404, "invalid_request_error", "not_found_error", "NOT_FOUND"),
    ErrorKind.METHOD_NOT_ALLOWED: ErrorTraits(405, "invalid_request_error", "invalid_request_error", "UNIMPLEMENTED"),
    ErrorKind.REQUEST_TIMEOUT: ErrorTraits(408, "invalid_request_error", "invalid_request_error", "DEADLINE_EXCEEDED"),
    ErrorKind.CONFLICT: ErrorTraits(409, "invalid_request_error", "invalid_request_error", "ABORTED"),
    ErrorKind.PRECONDITION_FAILED: ErrorTraits(
        412, "invalid_request_error", "invalid_request_error", "FAILED_PRECONDITION"
    ),
    ErrorKind.UNPROCESSABLE: ErrorTraits(422, *_INVALID),
    ErrorKind.BODY_TOO_LARGE: ErrorTraits(413, "invalid_request_error", "request_too_large", "INVALID_ARGUMENT"),
    ErrorKind.UNSUPPORTED_MEDIA_TYPE: ErrorTraits(415, *_INVALID),
    ErrorKind.RATE_LIMITED: ErrorTraits(429, *_LIMITED, True),
    ErrorKind.TOO_MANY_ATTEMPTS: ErrorTraits(429, *_LIMITED, True),
    ErrorKind.INSUFFICIENT_QUOTA: ErrorTraits(429, "insufficient_quota", "rate_limit_error", "RESOURCE_EXHAUSTED"),
    ErrorKind.CLIENT_CLOSED: ErrorTraits(499, "api_error", "api_error", "CANCELLED"),
    ErrorKind.INTERNAL: ErrorTraits(500, "api_error", "api_error", "INTERNAL"),
    ErrorKind.UPSTREAM_INVALID: ErrorTraits(502, "api_error", "api_error", "INTERNAL", True),
    ErrorKind.UPSTREAM_UNAVAILABLE: ErrorTraits(502, "api_error", "api_error", "UNAVAILABLE", True),
    ErrorKind.OVERLOADED: ErrorTraits(503, "overloaded_error", "overloaded_error", "RESOURCE_EXHAUSTED", True),
    ErrorKind.LOADING: ErrorTraits(503, "overloaded_error", "overloaded_error", "UNAVAILABLE", True),
    ErrorKind.NOT_SERVED: ErrorTraits(503, "overloaded_error", "overloaded_error", "UNAVAILABLE", True),
    ErrorKind.SHUTTING_DOWN: ErrorTraits(503, "overloaded_error", "overloaded_error", "UNAVAILABLE", True),
    ErrorKind.UNAVAILABLE: ErrorTraits(503, "api_error", "api_error", "UNAVAILABLE", True),
    ErrorKind.STORAGE_FULL: ErrorTraits(503, "api_error", "api_error", "RESOURCE_EXHAUSTED", True),
    ErrorKind.DEADLINE: ErrorTraits(504, "api_error", "api_error", "DEADLINE_EXCEEDED", True),
}


class HelixError(Exception):
    """An error of a known kind, with a message meant for the caller.

    `message` says what to do and carries nothing internal; the cause is chained with `raise … from exc`, logged and
    never rendered. `param` names the offending field (`messages[1].content`); `code` overrides the kind's code where
    an upstream gave its own; `retry_after_s` is an honest estimate in seconds.
    """

    def __init__(
        self,
        kind: ErrorKind,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.param = param
        self.code = code if code is not None else kind.value
        self.retry_after_s = retry_after_s

    @property
    def traits(self) -> ErrorTraits:
        return ERRORS[self.kind]


class UserError(Exception):
    """A mistake of the person at the terminal: shown as one clear line, never as a traceback.

    `exit_code` is one of `ExitCode`.
    """

    def __init__(self, message: str, exit_code: "ExitCode | None" = None) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code if exit_code is not None else ExitCode.FAILURE


class ExitCode(int, Enum):
    """Exit codes of `helixflow`, documented in docs/reference/cli.md."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    CONFIG = 3
    PORT_BUSY = 4
    MODEL = 5
    UNAVAILABLE = 6
    STORAGE = 7
    INTERRUPTED = 130
