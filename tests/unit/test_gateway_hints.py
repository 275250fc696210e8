import pytest

from helixflow.core.call import NO_HINTS, Hints
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.openai_chat import parse_chat
from helixflow.gateway.hints import read_hints, read_timeout

PLAIN = parse_chat(b'{"model":"m","messages":[{"role":"user","content":"Hi"}]}')
OF_ADA = parse_chat(b'{"model":"m","user":"ada","messages":[{"role":"user","content":"Hi"}]}')


def test_requests_without_hints_share_one_object() -> None:
    assert read_hints({b"content-type": b"application/json"}, PLAIN) is NO_HINTS


def test_headers_and_the_user_field_are_taken_over() -> None:
    headers = {b"x-helixflow-session": b"s-1", b"x-helixflow-residency": b"eu-west.1"}
    assert read_hints(headers, OF_ADA) == Hints(session="s-1", user="ada", residency="eu-west.1")


@pytest.mark.parametrize(
    "headers",
    [
        {b"x-helixflow-session": b""},
        {b"x-helixflow-session": b"s" * 257},
        {b"x-helixflow-residency": b""},
        {b"x-helixflow-residency": b"EU"},
        {b"x-helixflow-residency": b"e\xc3\xbc"},
    ],
)
def test_hints_that_cannot_be_meant_are_refused_by_name(headers: dict[bytes, bytes]) -> None:
    with pytest.raises(HelixError) as caught:
        read_hints(headers, PLAIN)
    assert caught.value.kind is ErrorKind.INVALID_VALUE
    assert caught.value.param == next(iter(headers)).decode()


@pytest.mark.parametrize(("text", "seconds"), [(b"1", 0.001), (b"2500", 2.5), (b"999999999", 600.0)])
def test_a_deadline_is_never_later_than_the_settings_allow(text: bytes, seconds: float) -> None:
    assert read_timeout({b"x-helixflow-timeout-ms": text}, 600.0) == seconds
    assert read_timeout({}, 600.0) == 600.0


@pytest.mark.parametrize("text", [b"0", b"-1", b"1.5", b"1s", b"", b"1" * 10, b"\xd9\xa1"])
def test_a_deadline_is_a_number_of_milliseconds(text: bytes) -> None:
    with pytest.raises(HelixError) as caught:
        read_timeout({b"x-helixflow-timeout-ms": text}, 600.0)
    assert (caught.value.kind, caught.value.param) == (ErrorKind.INVALID_VALUE, "x-helixflow-timeout-ms")
