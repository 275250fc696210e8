import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from helixflow.console.bodies import check_json, check_media_type
from helixflow.console.fields import Email, Name, Network, RoleName, parse_moment
from helixflow.core.errors import ErrorKind, HelixError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1970-01-01T00:00:01Z", 1),
        ("2027-01-31T00:00:00Z", 1_801_353_600),
        ("2027-01-31t01:30:00.999999999+01:30", 1_801_353_600),
        ("2016-12-31T23:59:60Z", 1_483_228_800),
        ("9999-12-31T23:59:59Z", 253_402_300_799),
    ],
)
def test_times(text: str, seconds: int) -> None:
    assert parse_moment(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2027-01-31",
        "2027-01-31T00:00:00",
        "2027-02-30T00:00:00Z",
        "2027-01-31T24:00:00Z",
        "2027-01-31T00:00:00+25:00",
        "1969-12-31T23:59:59Z",
        "9999-12-31T23:59:59-01:00",
        "0001-01-01T00:00:00+01:00",
        "٢٠٢٧-01-31T00:00:00Z",
        "2027-01-31T00:00:00Z\n",
        "1801353600",
        1_801_353_600,
        None,
    ],
)
def test_what_is_no_time(text: object) -> None:
    with pytest.raises(ValueError, match="must be a time"):
        parse_moment(text)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (
            Name,
            ["a", "Ü" * 100, "a b", "😀", "'; DROP TABLE users; --", "a\u200db"],
            ["", " ", "a\n", "\x00a", "a" * 101],
        ),
        (Email, ["a@b", "ada.l+x@example.com", "ü@exämple.de"], ["a", "@b", "a@", "a b@c", "a@b@c", "a@b\n", '"a"@b']),
        (RoleName, ["a", "key-keeper_2"], ["", "A", "2a", "-a", "a" * 51, "a\n", "ä"]),
        (Network, ["::/0", "10.0.0.0/8", "2001:db8::7"], ["", "x", "10.0.0.0/8 ", "10.0.0.0/", "10.0.0.0/8\n"]),
    ],
)
def test_shapes(kind: object, good: list[str], bad: list[str]) -> None:
    adapter: TypeAdapter[str] = TypeAdapter(kind)
    assert [adapter.validate_python(text) for text in good] == good
    for text in bad:
        with pytest.raises(ValidationError) as caught:
            adapter.validate_python(text)
        assert len(text) < 2 or text not in caught.value.errors()[0]["msg"]


@given(st.binary(max_size=200))
def test_any_bytes_are_json_or_refused(body: bytes) -> None:
    try:
        check_json(body)
    except HelixError as error:
        assert error.kind in (ErrorKind.INVALID_JSON, ErrorKind.INVALID_VALUE)


@given(st.recursive(st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(), st.lists, max_leaves=20))
def test_json_without_nul_is_let_through(value: object) -> None:
    body = msgspec.json.encode(value)
    if b"\\u0000" not in body:
        check_json(body)


@pytest.mark.parametrize("depth", [1, 63])
def test_nesting_is_bounded(depth: int) -> None:
    check_json(b"[" * depth + b"]" * depth)
    with pytest.raises(HelixError, match="nested deeper than 64"):
        check_json(b"[" * 65 + b"]" * 65)


def test_a_refusal_of_json_repeats_nothing() -> None:
    with pytest.raises(HelixError) as caught:
        check_json(b'{"password": hunter2}')
    assert "hunter2" not in caught.value.message and caught.value.__cause__ is None


@pytest.mark.parametrize("content_type", ["application/json", 'Application/JSON; charset="UTF-8"', "application/json;"])
def test_media_types_of_json(content_type: str) -> None:
    check_media_type(content_type, "identity")
