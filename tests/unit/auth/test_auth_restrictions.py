from functools import partial

import pytest

from helixflow.auth.restrictions import (
    MAX_ENTRIES,
    Restrictions,
    check_effective_in_project,
    parse_expiry,
    parse_models,
    parse_networks,
    parse_scopes_given,
    permissions_in_projects,
)
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.permissions import INSTALLATION_PERMISSIONS, ROLE_PERMISSIONS, Permission


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ([], ()),
        (["192.0.2.7"], ("192.0.2.7/32",)),
        (["2001:DB8:0::/32", "10.0.0.0/8", "10.0.0.0/8"], ("10.0.0.0/8", "2001:db8::/32")),
        (["0.0.0.0/0", "::/0"], ("0.0.0.0/0", "::/0")),
        (["10.2.0.0/16", "10.0.0.0/8", "9.0.0.0/8"], ("9.0.0.0/8", "10.0.0.0/8", "10.2.0.0/16")),
    ],
)
def test_networks_are_kept_in_canonical_form(given: list[str], kept: tuple[str, ...]) -> None:
    assert parse_networks(given) == kept


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/8",
        "10.0.0.1/8",
        "10.0.0.0/33",
        "10.0.0.0/-1",
        "10.0.0.0/255.0.0.0",
        "10.0.0.0/0.255.255.255",
        "10.0.0.0/8/8",
        "10.0.0.0/８",
        "010.0.0.0/8",
        "10.0.0",
        "167772160",
        "fe80::1%eth0",
        "fe80::%eth0/64",
        "::ffff:10.0.0.0/104",
        "example.com",
        "10.0.0.0/8\n",
        " 10.0.0.0/8",
        "10.0.0.0/8\0",
        "1" * 5000,
    ],
)
def test_what_is_no_network_is_refused_and_not_repeated_at_length(text: str) -> None:
    with pytest.raises(HelixError) as caught:
        parse_networks([text])
    assert (caught.value.kind, caught.value.param) == (ErrorKind.UNPROCESSABLE, "networks")
    assert len(caught.value.message) < 300


def test_models_are_names_as_in_the_settings() -> None:
    assert parse_models(["b", "a/b:c@1.0+x", "b"]) == ("a/b:c@1.0+x", "b")
    for name in ("", "-x", "a b", "a\n", "x" * 201, "gpt*", "ａ", "a\0"):
        with pytest.raises(HelixError) as caught:
            parse_models(["fine", name])
        assert (caught.value.kind, caught.value.param) == (ErrorKind.UNPROCESSABLE, "models")


@pytest.mark.parametrize(
    ("parse", "param"),
    [(parse_models, "models"), (parse_networks, "networks"), (partial(parse_scopes_given, operator=True), "scopes")],
)
def test_lists_are_bounded(parse: object, param: str) -> None:
    assert callable(parse)
    with pytest.raises(HelixError) as caught:
        parse(["10.0.0.0/8"] * (MAX_ENTRIES + 1))
    assert (caught.value.kind, caught.value.param) == (ErrorKind.UNPROCESSABLE, param)


@pytest.mark.parametrize("operator", [False, True])
def test_no_key_has_what_belongs_to_operators_or_does_not_exist(operator: bool) -> None:
    assert parse_scopes_given(["keys:read", "keys:read"], operator=operator) == {Permission.KEYS_READ}
    assert parse_scopes_given(sorted(ROLE_PERMISSIONS), operator=operator) == ROLE_PERMISSIONS
    beyond = INSTALLATION_PERMISSIONS - ({Permission.METRICS_READ} if operator else set())
    for name in [*beyond, "keys:*", "*", "", "KEYS:READ", "keys:read ", "\u202ekeys:read"]:
        with pytest.raises(HelixError) as caught:
            parse_scopes_given(["models:use", name], operator=operator)
        assert (caught.value.kind, caught.value.param) == (ErrorKind.UNPROCESSABLE, "scopes")


def test_what_no_project_ever_asks_for_is_refused_for_keys_of_a_project() -> None:
    assert {"models:use", "keys:create", "members:update", "projects:delete"} <= permissions_in_projects()
    check_effective_in_project(permissions_in_projects())
    for permission in ("users:delete", "audit:read", "roles:create", "organisations:delete", "projects:create"):
        with pytest.raises(HelixError, match=permission):
            check_effective_in_project({Permission(permission), Permission.MODELS_USE})


def test_a_key_expires_in_the_future_or_never() -> None:
    assert parse_expiry(0, 1000) is None
    assert parse_expiry(1001, 1000) == 1001
    for wrong in (-1, 1, 1000, 253_402_300_800, 2**63 - 1, -(2**63)):
        with pytest.raises(HelixError) as caught:
            parse_expiry(wrong, 1000)
        assert (caught.value.kind, caught.value.param) == (ErrorKind.UNPROCESSABLE, "expires_at")


@pytest.mark.parametrize(
    ("own", "other", "param"),
    [
        (Restrictions(), Restrictions(), None),
        (Restrictions(), Restrictions(("a",), ("10.0.0.0/8",), 5), None),
        (Restrictions(models=("a", "b")), Restrictions(models=("b",)), None),
        (Restrictions(models=("a", "b")), Restrictions(), "models"),
        (Restrictions(models=("a", "b")), Restrictions(models=("b", "c")), "models"),
        (Restrictions(networks=("10.0.0.0/8",)), Restrictions(networks=("10.1.0.0/16", "10.0.0.0/8")), None),
        (Restrictions(networks=("10.0.0.0/8",)), Restrictions(), "networks"),
        (Restrictions(networks=("10.0.0.0/8",)), Restrictions(networks=("10.1.0.0/16", "11.0.0.0/8")), "networks"),
        (Restrictions(networks=("10.0.0.0/8",)), Restrictions(networks=("0.0.0.0/0",)), "networks"),
        (Restrictions(networks=("10.0.0.0/8",)), Restrictions(networks=("::/0",)), "networks"),
        (Restrictions(networks=("::/0",)), Restrictions(networks=("2001:db8::/32",)), None),
        (Restrictions(expires_at=5), Restrictions(expires_at=5), None),
        (Restrictions(expires_at=5), Restrictions(expires_at=6), "expires_at"),
        (Restrictions(expires_at=5), Restrictions(), "expires_at"),
    ],
)
def test_a_restricted_key_covers_only_what_is_as_restricted(
    own: Restrictions, other: Restrictions, param: str | None
) -> None:
    if param is None:
        own.check_covers(other)
        return
    with pytest.raises(HelixError) as caught:
        own.check_covers(other)
    assert (caught.value.kind, caught.value.param) == (ErrorKind.PERMISSION_DENIED, param)
