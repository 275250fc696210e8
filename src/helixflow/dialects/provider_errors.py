"""What other servers' errors mean. They differ in form and wording; out comes one of our kinds.

Their faults are not the caller's: only what the caller can mend (too long, refused by a filter, invalid) is told on, in
their words; the rest in ours.
"""

import email.utils
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
from msgspec import Struct

from helixflow.core.errors import ErrorKind, HelixError

_RETRY_AFTER_MAX_S: Final = 600.0
_MAX_MESSAGE: Final = 2000
_CODE: Final = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
# The provider's words, so far as they have been seen: OpenAI, Azure, Anthropic, Google, Mistral, Groq, Together, xAI,
# DeepSeek, OpenRouter, vLLM, TGI, llama.cpp, LM Studio, Ollama.
_TOO_LONG: Final = re.compile(
    r"context[ _](?:length|window|size|limit)|maximum context|prompt is too long|prompt too long|maximum prompt length"
    r"|longer than the maximum model length|exceeds the maximum number of tokens|input token count.{0,40}exceeds"
    r"|exceed_context_size|reduce the length of (?:the|your) (?:messages|prompt|input)"
    r"|inputs` tokens \+|too large for model with \d+ maximum",
    re.IGNORECASE,
)
_TOO_LONG_CODES: Final = frozenset({"context_length_exceeded", "exceed_context_size_error", "string_above_max_length"})
_FILTERED: Final = re.compile(
    r"content[ _]filter|content management policy|content policy|content exists risk|usage guidelines|usage policy"
    r"|\bflagged\b|safety system",
    re.IGNORECASE,
)
_REFUSED_CONTENT: Final = "The model's provider refused the request's content."
_FILTERED_CODES: Final = frozenset(
    {
        *("content_filter", "content_policy_violation", "moderation_blocked", "data_inspection_failed"),
        *("responsibleaipolicyviolation", "content_filtered"),
    }
)
# Our account there is the matter: nothing that a caller, or trying again soon, could mend.
_NO_CREDIT: Final = re.compile(r"credit balance is too low|insufficient.{0,10}(?:balance|credit)", re.IGNORECASE)
_NO_CREDIT_CODES: Final = frozenset({"insufficient_quota", "billing_hard_limit_reached", "billing_error"})
_UNABLE: Final = re.compile(r"does(?: not|n't) support|(?:is|are) not supported|unsupported (?:parameter|value)", re.I)
# Statuses for errors that come inside an answer with status 200 and only say what they are.
_STATUS_OF: Final[Mapping[str, int]] = {
    "overloaded_error": 529,
    "overloaded": 529,
    "server_overloaded": 503,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "insufficient_quota": 429,
    "billing_error": 402,
    "invalid_request_error": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "timeout_error": 504,
}


class ProviderError(Struct, frozen=True):
    """An error as a server has told it; `code` may be a status there, or any word."""

    message: str = ""
    code: str = ""
    type: str = ""
    param: str | None = None

    def implied_status(self) -> int:
        """The HTTP status that it would have come with; 500 when it does not say."""
        if len(self.code) == 3 and self.code.isdecimal() and "400" <= self.code <= "599":
            return int(self.code)
        return _STATUS_OF.get(self.code) or _STATUS_OF.get(self.type) or 500


_NOTHING: Final = ProviderError()


def read_error(body: bytes) -> ProviderError:
    """The error in a body, whatever its form: `{"error": {…}}`, `{"error": "…"}`, a list of such, `{"message": …}`,
    `{"detail": …}`; one that says nothing where there is none.
    """
    try:
        return error_of(msgspec.json.decode(body))
    except (msgspec.DecodeError, ValueError, RecursionError):
        return _NOTHING


def error_of(found: Any) -> ProviderError:
    """The same for what is decoded already."""
    if isinstance(found, list) and found:
        found = found[0]
    if isinstance(found, dict) and found.get("error"):
        found = found["error"]
    if isinstance(found, str):
        return ProviderError(_short(found))
    if not isinstance(found, dict):
        return _NOTHING
    message = found.get("message") or found.get("detail") or ""
    return ProviderError(
        _short(message) if isinstance(message, str) else "",
        _word(found.get("code")) or _word(found.get("status")),
        _word(found.get("type")),
        found["param"][:200] if isinstance(found.get("param"), str) else None,
    )


def refusal(error: ProviderError, status: int, retry_after_s: float | None = None) -> HelixError:
    """What an error with this status means for our caller. `retry_after_s` is what the server asked for."""
    code, message = error.code.lower(), error.message
    if status == 402 or code in _NO_CREDIT_CODES or error.type in _NO_CREDIT_CODES or _NO_CREDIT.search(message):
        return HelixError(
            ErrorKind.UPSTREAM_UNAVAILABLE, "The gateway's account at the model's provider has no credit left."
        )
    if status in (400, 403, 409, 413, 415, 422) and (code in _FILTERED_CODES or _FILTERED.search(message)):
        return _callers(ErrorKind.CONTENT_FILTERED, error, _REFUSED_CONTENT)
    if status in (401, 403):
        return HelixError(ErrorKind.UPSTREAM_UNAVAILABLE, "The model's server refused the gateway's credentials.")
    if status in (400, 409, 413, 415, 422):
        if code in _TOO_LONG_CODES or error.type in _TOO_LONG_CODES or _TOO_LONG.search(message):
            return _callers(ErrorKind.CONTEXT_LENGTH_EXCEEDED, error, "The request is too long for this model.")
        if status == 413:
            return _callers(ErrorKind.BODY_TOO_LARGE, error, "The model's server refused the request as too large.")
        kind = ErrorKind.UNSUPPORTED if _UNABLE.search(message) else ErrorKind.INVALID_REQUEST
        return _callers(kind, error, "The model's server refused the request as invalid.")
    if status == 404:
        return HelixError(ErrorKind.UPSTREAM_UNAVAILABLE, "The model's server does not know this model or endpoint.")
    if status == 429:
        return HelixError(
            ErrorKind.RATE_LIMITED, "The model's server is limiting requests.", retry_after_s=retry_after_s or 1.0
        )
    if status in (503, 529):
        return HelixError(ErrorKind.OVERLOADED, "The model's server is overloaded.", retry_after_s=retry_after_s)
    if status in (408, 504):
        return HelixError(ErrorKind.DEADLINE, "The model's server did not answer in time.")
    return HelixError(ErrorKind.UPSTREAM_UNAVAILABLE, f"The model's server failed with status {status}.")


def event_refusal(error: ProviderError) -> HelixError:
    """The same for an error inside an answer with status 200."""
    status = error.implied_status()
    if status == 500:
        if error.code.lower() in _FILTERED_CODES:
            status = 400
        elif not (_NO_CREDIT.search(error.message) or error.code in _NO_CREDIT_CODES):
            return HelixError(ErrorKind.UPSTREAM_UNAVAILABLE, "The model's server reported an error.")
    return refusal(error, status)


def retry_after(headers: Mapping[bytes, bytes], *, now: datetime | None = None) -> float | None:
    """Seconds until the server wants to be asked again, at most ten minutes; None when it does not say."""
    value = headers.get(b"retry-after")
    if value is None:
        return None
    text = value.decode("latin-1").strip()
    try:
        wait_s = float(text) if text[:1].isdigit() and "," not in text else _until(text, now or datetime.now(UTC))
    except (ValueError, OverflowError):
        return None
    return min(max(wait_s, 0.0), _RETRY_AFTER_MAX_S) if wait_s == wait_s else None


def _until(date: str, now: datetime) -> float:
    moment = email.utils.parsedate_to_datetime(date)
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp() - now.timestamp()


def content_filtered() -> HelixError:
    """For an answer that is nothing but the word of a filter."""
    return HelixError(ErrorKind.CONTENT_FILTERED, _REFUSED_CONTENT)


def _callers(kind: ErrorKind, error: ProviderError, default: str) -> HelixError:
    """In the server's own words, and with its code where that is one: it stands in records of ours, so not just
    anything will do; and some send the status again.
    """
    code = error.code if _CODE.fullmatch(error.code) and not error.code.isdigit() else None
    if kind in (ErrorKind.CONTEXT_LENGTH_EXCEEDED, ErrorKind.CONTENT_FILTERED, ErrorKind.UNSUPPORTED):
        code = None
    return HelixError(kind, error.message or default, param=error.param, code=code)


def _short(message: str) -> str:
    return message if len(message) <= _MAX_MESSAGE else message[:_MAX_MESSAGE] + "…"


def _word(value: Any) -> str:
    """A code or type as text; some are numbers."""
    return str(value)[:64] if isinstance(value, str | int) and not isinstance(value, bool) else ""
