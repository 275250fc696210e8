import ipaddress
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from helixflow.core.clock import FakeClock
from helixflow.core.errors import ExitCode, UserError
from helixflow.pki.certificates import KeyPair, fingerprint, is_issued_by, names_of
from helixflow.pki.identity import ServiceIdentity
from helixflow.pki.issuing import NODE_SERVICES, Issuance, ensure_pki
from helixflow.pki.names import Names, parse_names
from tests.unit.pki.conftest import Node

HOUR = 3600.0
ALL = list(NODE_SERVICES)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_first_start_makes_an_authority_that_signs_leaves_only(node: Node) -> None:
    assert ensure_pki(node.settings, clock=node.clock) == ALL
    (root,) = node.roots()
    assert isinstance(root.public_key(), ec.EllipticCurvePublicKey)
    constraints = root.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)
    usage = root.extensions.get_extension_for_class(x509.KeyUsage)
    assert (usage.critical, usage.value.key_cert_sign, usage.value.digital_signature) == (True, True, False)


def test_a_service_has_its_identity_its_dns_name_and_a_short_life(node: Node) -> None:
    node.issuance.ensure()
    certificate = node.certificate("gateway")
    assert names_of(certificate) == Names(
        uris=frozenset({"spiffe://helixflow.internal/gateway"}),
        dns=frozenset({"gateway.helixflow.internal", "localhost"}),
    )
    now = node.clock.now()
    assert certificate.not_valid_after_utc.timestamp() == now + 24 * HOUR
    assert certificate.not_valid_before_utc.timestamp() == now - 300
    usages = set(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    assert usages == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert is_issued_by(certificate, node.roots()[0])


def test_control_answers_for_the_services_it_plays(node: Node) -> None:
    node.issuance.ensure()
    assert names_of(node.certificate("control")).dns == {
        f"{name}.helixflow.internal" for name in ("control", "auth", "pool")
    } | {"localhost"}


def test_the_https_certificate_is_no_identity_among_services(tmp_path: Path, clock: FakeClock) -> None:
    names = ["api.example.com", "*.apps.example.com", "192.0.2.7", "bücher.example"]
    node = Node(tmp_path / "d", clock, gateway={"tls_names": names, "https_host": "0.0.0.0"})
    node.issuance.ensure()
    found = names_of(node.certificate("https"))
    assert found.uris == frozenset()
    assert {"localhost", "api.example.com", "*.apps.example.com", "xn--bcher-kva.example"} <= found.dns
    assert {str(one) for one in found.addresses} == {"127.0.0.1", "::1", "192.0.2.7"}
    usage = node.certificate("https").extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]


def test_no_https_certificate_beside_the_operators(tmp_path: Path, clock: FakeClock) -> None:
    gateway = {"certificate_file": tmp_path / "c.pem", "key_file": tmp_path / "k.pem"}
    node = Node(tmp_path / "d", clock, gateway=gateway)
    assert "https" not in node.issuance.ensure()


@pytest.mark.parametrize("name", ["two words", "a..b", "-x.example", "https://example.com", "", "a" * 64 + ".example"])
def test_a_name_that_no_certificate_can_carry_is_refused(tmp_path: Path, clock: FakeClock, name: str) -> None:
    node = Node(tmp_path / "d", clock, gateway={"tls_names": [name]})
    with pytest.raises(UserError) as caught:
        node.issuance.ensure()
    assert caught.value.exit_code is ExitCode.CONFIG
    assert repr(name) in caught.value.message


def test_renewed_at_two_thirds_of_its_life_and_not_before(node: Node) -> None:
    node.issuance.ensure()
    first = contents(node.folder.services)
    node.clock.advance(16 * HOUR - 400)
    assert node.issuance.renew() == []
    assert contents(node.folder.services) == first
    node.clock.advance(400)
    assert sorted(node.issuance.renew()) == sorted(ALL)
    assert node.issuance.renew() == []
    assert node.certificate("gateway").not_valid_after_utc.timestamp() == node.clock.now() + 24 * HOUR


def test_a_start_long_after_everything_has_expired_issues_anew(node: Node) -> None:
    node.issuance.ensure()
    node.clock.advance(90 * 24 * HOUR)
    assert node.issuance.ensure() == ALL
    ServiceIdentity(node.folder, "helixflow.internal", "gateway", clock=node.clock)


def test_a_second_start_changes_nothing(node: Node) -> None:
    node.issuance.ensure()
    before = contents(node.folder.path)
    assert ensure_pki(node.settings, clock=node.clock) == []
    assert contents(node.folder.path) == before


def test_what_the_settings_change_is_issued_anew(tmp_path: Path, clock: FakeClock) -> None:
    Node(tmp_path, clock).issuance.ensure()
    other_names = Node(tmp_path, clock, gateway={"tls_names": ["api.example.com"]})
    assert other_names.issuance.ensure() == ["https"]
    other_domain = Node(tmp_path, clock, pki={"trust_domain": "example.org"})
    assert set(NODE_SERVICES) - {"https"} <= set(other_domain.issuance.ensure())
    shorter = Node(tmp_path, clock, pki={"trust_domain": "example.org", "certificate_hours": 1})
    assert shorter.issuance.ensure() == ALL


def test_never_longer_than_the_authority_lives(node: Node) -> None:
    node.issuance.ensure()
    end = node.roots()[0].not_valid_after_utc.timestamp()
    node.clock.advance(end - node.clock.now() - HOUR)
    node.issuance.ensure()
    assert node.certificate("gateway").not_valid_after_utc.timestamp() == end
    node.clock.advance(2 * HOUR)
    with pytest.raises(UserError, match="has expired"):
        node.issuance.ensure()


def test_keys_are_their_owners_alone(node: Node) -> None:
    old = os.umask(0)
    try:
        node.issuance.ensure()
    finally:
        os.umask(old)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (node.folder.path, *node.folder.path.rglob("*"))}
    assert modes.pop(node.folder.path) == modes.pop(node.folder.services) == 0o700
    assert modes.pop(node.folder.ca_certificate) == 0o644
    assert set(modes.values()) == {0o600}
    assert node.folder.ca_key in modes
    assert all(node.folder.service_file(service) in modes for service in ALL)


def test_starts_at_once_agree_on_one_authority(node: Node) -> None:
    def start(_number: int) -> list[str]:
        return Issuance(node.settings, clock=node.clock).ensure()

    with ThreadPoolExecutor(8) as threads:
        issued = [name for names in threads.map(start, range(8)) for name in names]
    assert sorted(issued) == sorted(ALL)
    assert len(node.roots()) == 1
    for service in set(NODE_SERVICES) - {"https"}:
        ServiceIdentity(node.folder, "helixflow.internal", service, clock=node.clock)


def test_a_creation_that_broke_off_is_completed(node: Node) -> None:
    node.issuance.ensure()
    (root,) = node.roots()
    node.folder.ca_certificate.unlink()
    (node.folder.services / ".new-0123456789abcdef").write_bytes(b"half a key")
    assert node.issuance.ensure() == []
    assert node.roots() == [root]
    assert not list(node.folder.services.glob(".new-*"))


def test_a_process_never_sees_a_key_without_its_certificate(node: Node) -> None:
    node.issuance.ensure()
    path = node.folder.service_file("gateway")
    with path.open("rb") as held:
        node.issuance.issue("gateway")
        old, new = held.read(), path.read_bytes()
    assert KeyPair.parse(old).certificate != KeyPair.parse(new).certificate


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda pem: b"", "no readable private key"),
        (lambda pem: pem[:60], "no readable private key"),
        (lambda pem: pem[: pem.index(b"-----BEGIN CERT")], "no certificate"),
        (lambda pem: pem.replace(b"CERTIFICATE-----\nMII", b"CERTIFICATE-----\nAAA"), "damaged"),
    ],
)
def test_a_damaged_file_is_named_with_what_to_do(node: Node, damage: object, says: str) -> None:
    node.issuance.ensure()
    path = node.folder.service_file("gateway")
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(UserError) as caught:
        node.issuance.ensure()
    assert caught.value.exit_code is ExitCode.CONFIG
    assert str(path) in caught.value.message
    assert says in caught.value.message
    assert "helixflow pki rotate" in caught.value.message
    node.issuance.rotate()
    assert node.issuance.ensure() == []


def test_one_damaged_file_does_not_keep_the_others_from_renewal(node: Node) -> None:
    node.issuance.ensure()
    node.folder.service_file("console").write_bytes(b"")
    node.clock.advance(17 * HOUR)
    with pytest.raises(UserError, match=r"console\.pem"):
        node.issuance.renew()
    assert node.certificate("monitoring").not_valid_after_utc.timestamp() == node.clock.now() + 24 * HOUR


def test_a_key_of_another_certificate_is_refused(node: Node) -> None:
    node.issuance.ensure()
    gateway, control = (node.folder.service_file(one) for one in ("gateway", "control"))
    mixed = KeyPair.parse(gateway.read_bytes()).key_pem() + KeyPair.parse(control.read_bytes()).chain_pem()
    gateway.write_bytes(mixed)
    with pytest.raises(UserError, match="do not belong together"):
        node.issuance.ensure()


@pytest.mark.parametrize("name", ["ca.key", "services/gateway.pem"])
def test_a_key_that_others_can_read_is_refused(node: Node, name: str) -> None:
    node.issuance.ensure()
    path = node.folder.path / name
    path.chmod(0o640)
    with pytest.raises(UserError, match=f"chmod 600 {path}") as caught:
        node.issuance.ensure()
    assert caught.value.exit_code is ExitCode.CONFIG


def test_a_folder_that_others_can_write_to_is_refused(node: Node) -> None:
    node.issuance.ensure()
    node.folder.services.chmod(0o770)
    with pytest.raises(UserError, match="chmod 700"):
        node.issuance.ensure()


def test_revoking_a_service_replaces_its_certificate_first(node: Node) -> None:
    node.issuance.ensure()
    old = node.certificate("gateway")
    sold = KeyPair.parse(node.issuance.issue_elsewhere("gateway", Names())).certificate
    assert sorted(node.issuance.revoke("gateway")) == sorted(f"{one.serial_number:x}" for one in (old, sold))
    assert node.issuance.register.revoked_serials() == {old.serial_number, sold.serial_number}
    assert node.certificate("gateway") != old
    assert node.issuance.renew() == []


def test_revoking_by_serial_as_openssl_shows_it(node: Node) -> None:
    node.issuance.ensure()
    serial = node.certificate("console").serial_number
    shown = serial.to_bytes(20, "big").hex(":").upper()
    assert node.issuance.revoke(shown) == [f"{serial:x}"]
    assert node.certificate("console").serial_number != serial
    # One that we know nothing of, perhaps of an authority elsewhere.
    assert node.issuance.revoke("ab" * 16) == ["ab" * 16]
    assert int("ab" * 16, 16) in node.issuance.register.revoked_serials()


@pytest.mark.parametrize("what", ["nobody", "monitoring2", "12"])
def test_revoking_what_there_is_not_is_refused(node: Node, what: str) -> None:
    node.issuance.ensure()
    with pytest.raises(UserError, match="on record"):
        node.issuance.revoke(what)


def test_a_damaged_list_of_revocations_is_not_taken_for_an_empty_one(node: Node) -> None:
    node.issuance.ensure()
    node.folder.revoked.write_bytes(b'{"serial": "zz"}\n')
    with pytest.raises(UserError, match="is damaged"):
        ServiceIdentity(node.folder, "helixflow.internal", "gateway", clock=node.clock)


def test_for_another_node(node: Node) -> None:
    node.issuance.ensure()
    before = contents(node.folder.services)
    pair = KeyPair.parse(node.issuance.issue_elsewhere("gateway", parse_names(["gw2.example", "10.0.0.7"]), hours=720))
    names = names_of(pair.certificate)
    assert names.uris == {"spiffe://helixflow.internal/gateway"}
    assert {"gw2.example", "gateway.helixflow.internal"} <= names.dns
    assert names.addresses == {ipaddress.ip_address("10.0.0.7")}
    assert pair.certificate.not_valid_after_utc.timestamp() == node.clock.now() + 720 * HOUR
    assert contents(node.folder.services) == before


def test_an_unknown_service_is_refused(node: Node) -> None:
    node.issuance.ensure()
    with pytest.raises(UserError) as caught:
        node.issuance.issue("admin")
    assert caught.value.exit_code is ExitCode.USAGE


def test_a_new_authority_is_trusted_before_it_signs_and_the_old_one_until_its_last_certificate(node: Node) -> None:
    node.issuance.ensure()
    (old,) = node.roots()
    while_settling: list[bool] = []

    def settle() -> None:
        assert old in node.roots()
        assert len(node.roots()) == 2
        while_settling.append(is_issued_by(node.certificate("gateway"), old))

    assert sorted(node.issuance.trust_successor(None, None, settle=settle)) == sorted(ALL)
    assert while_settling == [True]
    new = node.roots()[0]
    assert fingerprint(new) != fingerprint(old)
    assert new.subject != old.subject
    assert is_issued_by(node.certificate("gateway"), new)
    node.clock.advance(23 * HOUR)
    node.issuance.renew()
    assert node.roots() == [new, old]
    node.clock.advance(1 * HOUR + 1)
    node.issuance.renew()
    assert node.roots() == [new]
    assert node.issuance.ensure() == []


def test_nothing_is_issued_before_there_is_an_authority(node: Node) -> None:
    for act in (node.issuance.rotate, node.issuance.renew, lambda: node.issuance.issue("gateway")):
        with pytest.raises(UserError, match="helixflow pki init"):
            act()
