import pytest

from helixflow.auth.texts import check_email, check_name, check_storable, email_key
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import admin_pb2 as pb


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (pb.GetRequest(id="a\0"), "id"),
        (pb.CreateRoleRequest(name="a", permissions=["keys:read", "\0"]), "permissions"),
        (pb.UpdateRoleRequest(permissions=pb.StringList(values=["a", "b\0"])), "values"),
        (pb.ListRolesResponse(roles=[pb.Role(), pb.Role(name="\0")]), "name"),
    ],
)
def test_nul_is_found_wherever_it_is(request_: pb.GetRequest, param: str) -> None:
    with pytest.raises(HelixError) as caught:
        check_storable(request_)
    assert (caught.value.kind, caught.value.param) == (ErrorKind.UNPROCESSABLE, param)


def test_other_requests_are_fine() -> None:
    check_storable(
        pb.UpdateKeyRequest(id="é\u202e\x01", if_version=3, expires_at=4, scopes=pb.StringList(values=["a"]))
    )
    check_storable(pb.ListRequest())


@pytest.mark.parametrize("name", ["x", "x" * 100, " padded ", "Ünïcödé 漢字 🙂", "<b>&'\";--", "Аdmin"])
def test_names_stay_as_they_are(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", " ", "\u3000", "x" * 101, "a\nb", "a\tb", "\u202eevil", "a\u200bb", "\x7f"])
def test_names_that_hide_something_are_refused(name: str) -> None:
    with pytest.raises(HelixError) as caught:
        check_name(name)
    assert caught.value.kind is ErrorKind.UNPROCESSABLE


@pytest.mark.parametrize("email", ["a@b", "o'hara+x@example.com", "ü@exämple.com", "x" * 64 + "@" + "y" * 189])
def test_emails_that_mail_servers_take_are_fine(email: str) -> None:
    assert check_email(email) == email


@pytest.mark.parametrize(
    "email",
    [
        "",
        "a",
        "@b",
        "a@",
        "a@b@c",
        "a b@c",
        "a@b\r\nTo: c@d",
        '"a"@b',
        "a@b,c@d",
        "x" * 65 + "@b",
        "a@" + "y" * 190,
        "a\0@b",
    ],
)
def test_other_emails_are_refused(email: str) -> None:
    with pytest.raises(HelixError) as caught:
        check_email(email)
    assert caught.value.kind is ErrorKind.UNPROCESSABLE


def test_emails_are_the_same_in_any_case_and_composition() -> None:
    assert email_key("José@Example.COM") == email_key("jose\u0301@example.com")
    assert email_key("a@b") != email_key("а@b")
