"""Errors of many servers, as they have been seen, and what they mean for our callers."""

from datetime import UTC, datetime

import pytest

from helixflow.core.errors import ErrorKind
from helixflow.dialects.provider_errors import event_refusal, read_error, refusal, retry_after

TOO_LONG = ErrorKind.CONTEXT_LENGTH_EXCEEDED
FILTERED = ErrorKind.CONTENT_FILTERED
UNAVAILABLE = ErrorKind.UPSTREAM_UNAVAILABLE


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, '{"error":{"message":"x","code":"context_length_exceeded"}}', TOO_LONG),
        (400, '{"error":{"message":"This model\'s maximum context length is 8 tokens.","code":400}}', TOO_LONG),
        (400, '{"error":{"message":"prompt is too long: 9 tokens > 8 maximum"}}', TOO_LONG),
        (400, '{"error":{"message":"input length and `max_tokens` exceed context limit: 1 + 2 > 3"}}', TOO_LONG),
        (400, '[{"error":{"message":"The input token count (9) exceeds the maximum allowed (8)."}}]', TOO_LONG),
        (422, '{"message":"Prompt contains 9 tokens, too large for model with 8 maximum"}', TOO_LONG),
        (400, '{"error":{"message":"Please reduce the length of the messages or completion."}}', TOO_LONG),
        (422, '{"error":"`inputs` tokens + `max_new_tokens` must be <= 8. Given: 9"}', TOO_LONG),
        (400, '{"error":{"message":"The prompt (length 9) is longer than the maximum model length of 8."}}', TOO_LONG),
        (400, '{"error":"the input length exceeds the context length"}', TOO_LONG),
        (400, '{"error":{"code":400,"message":"the request exceeds","type":"exceed_context_size_error"}}', TOO_LONG),
        (413, '{"error":{"message":"maximum prompt length is 8"}}', TOO_LONG),
        (413, "", ErrorKind.BODY_TOO_LARGE),
        (400, '{"error":{"code":"content_filter","message":"The response was filtered"}}', FILTERED),
        (400, '{"error":{"message":"Output blocked by content filtering policy"}}', FILTERED),
        (403, '{"error":{"code":403,"message":"Model requires moderation: your input was flagged"}}', FILTERED),
        (400, '{"error":{"message":"Content Exists Risk"}}', FILTERED),
        (403, '{"error":"Content violates usage guidelines."}', FILTERED),
        (403, '{"error":{"message":"forbidden"}}', UNAVAILABLE),
        (401, '{"error":{"message":"sk-1 is wrong"}}', UNAVAILABLE),
        (402, "{}", UNAVAILABLE),
        (429, '{"error":{"code":"insufficient_quota","message":"You exceeded your current quota"}}', UNAVAILABLE),
        (400, '{"error":{"message":"Your credit balance is too low to access the API"}}', UNAVAILABLE),
        (404, '{"error":"model \'x\' not found"}', UNAVAILABLE),
        (400, '{"error":"registry.ollama.ai/library/x does not support tools"}', ErrorKind.UNSUPPORTED),
        (400, '{"error":{"message":"Unsupported value: 2","code":"unsupported_value"}}', ErrorKind.UNSUPPORTED),
        (422, '{"detail":"nope"}', ErrorKind.INVALID_REQUEST),
        (429, "", ErrorKind.RATE_LIMITED),
        (429, '[{"error":{"message":"You exceeded your current quota","code":429}}]', ErrorKind.RATE_LIMITED),
        (529, '{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}', ErrorKind.OVERLOADED),
        (503, '{"error":"server busy"}', ErrorKind.OVERLOADED),
        (504, "<html>", ErrorKind.DEADLINE),
        (500, '{"error":{"message":"the context window broke"}}', UNAVAILABLE),
    ],
)  # fmt: skip
def test_what_a_status_and_a_body_mean(status: int, body: str, kind: ErrorKind) -> None:
    error = refusal(read_error(body.encode()), status)
    assert error.kind is kind
    if kind is UNAVAILABLE:
        assert "sk-1" not in error.message


def test_what_the_caller_can_mend_is_in_the_servers_words() -> None:
    told = refusal(read_error(b'{"error":{"message":"bad top_k","param":"top_k","code":"odd"}}'), 400)
    assert (told.message, told.param, told.code) == ("bad top_k", "top_k", "odd")
    long = refusal(read_error(b'{"error":{"message":"' + b"x" * 9000 + b'","code":"a b"}}'), 400)
    assert len(long.message) < 3000
    assert long.code == "invalid_request"


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ('{"error":{"code":429,"message":"slow down"}}', ErrorKind.RATE_LIMITED),
        ('{"error":{"code":502,"message":"Provider returned error"}}', UNAVAILABLE),
        ('{"error":{"type":"overloaded_error"}}', ErrorKind.OVERLOADED),
        ('{"error":{"code":"content_filter","message":"x"}}', FILTERED),
        ('{"error":"something"}', UNAVAILABLE),
        ('{"error":{"code":"99999999999999999999999","message":"x"}}', UNAVAILABLE),
        ('{"error":{"code":true}}', UNAVAILABLE),
    ],
)
def test_an_error_with_status_200(body: str, kind: ErrorKind) -> None:
    assert event_refusal(read_error(body.encode())).kind is kind


@pytest.mark.parametrize(
    "body", [b"", b"null", b"5", b"[]", b"{}", b'{"error":[]}', b"\xff", b"[" * 5000, b'{"error":{"message":5}}']
)
def test_a_body_that_says_nothing(body: bytes) -> None:
    error = refusal(read_error(body), 400)
    assert (error.kind, error.param) == (ErrorKind.INVALID_REQUEST, None)
    assert error.message


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"7", 7.0),
        (b"1.5", 1.5),
        (b"999999", 600.0),
        (b"Mon, 23 Nov 2026 08:00:30 GMT", 30.0),
        (b"Mon, 23 Nov 2020 08:00:30 GMT", 0.0),
        (b"soon", None),
        (b"-5", None),
        (b"1e999", 600.0),
        (b"\xff", None),
        (None, None),
    ],
)
def test_when_to_ask_again(value: bytes | None, expected: float | None) -> None:
    now = datetime(2026, 11, 23, 8, 0, 0, tzinfo=UTC)
    assert retry_after({} if value is None else {b"retry-after": value}, now=now) == expected
