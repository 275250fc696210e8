"""Authorities that the operator brings along, or keeps elsewhere."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from helixflow.core.clock import FakeClock
from helixflow.core.errors import ExitCode, UserError
from helixflow.pki.certificates import KeyPair, is_issued_by
from helixflow.pki.identity import ServiceIdentity
from helixflow.pki.names import Names
from tests.unit.pki.conftest import Node, Signer, create_signer


@pytest.fixture
def now(clock: FakeClock) -> float:
    return clock.now()


def written(folder: Path, signers: Sequence[Signer], key: bytes | None = None) -> tuple[Path, Path]:
    certificate, key_file = folder / "chain.pem", folder / "issuing.key"
    certificate.write_bytes(b"".join(one.pem() for one in signers))
    key_file.write_bytes(key if key is not None else signers[0].key_pem())
    return certificate, key_file


def test_an_intermediate_signs_and_only_the_root_is_trusted(node: Node, tmp_path: Path, now: float) -> None:
    root = create_signer("root", now)
    middle = create_signer("middle", now, by=root, signs=True)
    issuing = create_signer("issuing", now, by=middle, depth=0, signs=True)
    node.issuance.init(*written(tmp_path, [issuing, middle, root]))
    assert node.roots() == [root.certificate]
    chain = KeyPair.parse(node.folder.service_file("gateway").read_bytes()).chain
    assert chain[1:] == (issuing.certificate, middle.certificate)
    assert is_issued_by(chain[0], issuing.certificate)
    assert node.issuance.ensure() == []
    node.clock.advance(17 * 3600)
    assert "gateway" in node.issuance.renew()
    ServiceIdentity(node.folder, "helixflow.internal", "gateway", clock=node.clock)


@pytest.mark.parametrize(
    "key", [rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP384R1())], ids=["rsa", "p384"]
)
def test_other_kinds_of_key_sign_too(node: Node, tmp_path: Path, now: float, key: object) -> None:
    root = create_signer("root", now, key=key)
    node.issuance.init(*written(tmp_path, [root]))
    assert is_issued_by(node.certificate("control"), root.certificate)


def test_a_key_that_was_put_there_by_hand_finds_its_certificate(node: Node, now: float) -> None:
    root = create_signer("root", now)
    node.folder.prepare()
    node.folder.ca_certificate.write_bytes(root.pem())
    node.folder.ca_key.touch(0o600)
    node.folder.ca_key.write_bytes(root.key_pem())
    node.issuance.ensure()
    assert is_issued_by(node.certificate("gateway"), root.certificate)


def test_what_does_not_fit_is_refused_and_nothing_is_written(node: Node, tmp_path: Path, now: float) -> None:
    root = create_signer("root", now)
    issuing = create_signer("issuing", now, by=root)
    stranger = create_signer("stranger", now)
    cases: list[tuple[Sequence[Signer], bytes | None, str]] = [
        ([create_signer("leaf", now, ca=False)], None, "not a certificate authority"),
        ([create_signer("silent", now, signs=False)], None, "may sign"),
        ([create_signer("old", now, days=0.5)], None, "has expired"),
        ([issuing, create_signer("old", now, days=0.5)], None, "has expired"),
        ([root], stranger.key_pem(), "does not belong to the key"),
        ([root], root.key_pem(b"pass"), "decrypt it first"),
        ([root], b"nothing", "no readable private key"),
        ([root], ed25519_pem(), "not supported"),
        ([issuing], None, "append the certificates above"),
        ([issuing, stranger], None, "do not form a chain"),
        ([issuing, create_signer("tight", now, depth=0)], None, "do not form a chain|does not allow"),
        ([], root.key_pem(), "no certificate"),
    ]
    for signers, key, says in cases:
        files = written(tmp_path, signers, key)
        with pytest.raises(UserError, match=says) as caught:
            node.issuance.init(*files)
        assert caught.value.exit_code is ExitCode.CONFIG
        assert "PRIVATE" not in caught.value.message
        assert not node.folder.ca_key.exists()
        assert not node.folder.ca_certificate.exists()


def ed25519_pem() -> bytes:
    from cryptography.hazmat.primitives import serialization

    return ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def test_a_path_that_its_root_does_not_allow_is_refused(node: Node, tmp_path: Path, now: float) -> None:
    root = create_signer("root", now, depth=0)
    issuing = create_signer("issuing", now, by=root)
    with pytest.raises(UserError, match="does not allow 1 authorities below it"):
        node.issuance.init(*written(tmp_path, [issuing, root]))


def test_an_authority_is_never_overwritten(node: Node, tmp_path: Path, now: float) -> None:
    node.issuance.init()
    before = node.folder.ca_key.read_bytes()
    for files in ((), written(tmp_path, [create_signer("root", now)])):
        with pytest.raises(UserError, match="never overwritten"):
            node.issuance.init(*files)
    assert node.folder.ca_key.read_bytes() == before


def test_a_bundle_that_does_not_fit_the_key_is_refused(node: Node, now: float) -> None:
    node.issuance.init()
    node.folder.ca_certificate.write_bytes(create_signer("stranger", now).pem())
    with pytest.raises(UserError, match="does not lead to one in") as caught:
        node.issuance.ensure()
    assert str(node.folder.ca_key) in caught.value.message


@pytest.fixture
def elsewhere(tmp_path: Path, clock: FakeClock) -> Node:
    """A node that is given its certificates."""
    return Node(tmp_path / "elsewhere", clock)


def provide(node: Node, to: Node, *services: str) -> None:
    to.folder.prepare()
    to.folder.ca_certificate.write_bytes(node.folder.ca_certificate.read_bytes())
    for service in services:
        to.folder.service_file(service).touch(0o600)
        to.folder.service_file(service).write_bytes(node.issuance.issue_elsewhere(service, Names()))


def test_certificates_from_elsewhere_are_used_and_never_touched(node: Node, elsewhere: Node) -> None:
    node.issuance.init()
    provide(node, elsewhere, "auth", "console")
    before = elsewhere.folder.service_file("auth").read_bytes()
    assert elsewhere.issuance.ensure(("auth", "console")) == []
    elsewhere.clock.advance(20 * 3600)
    assert elsewhere.issuance.renew() == []
    assert elsewhere.folder.service_file("auth").read_bytes() == before
    for act in (elsewhere.issuance.rotate, lambda: elsewhere.issuance.issue("auth")):
        with pytest.raises(UserError, match="issued elsewhere"):
            act()
    assert elsewhere.issuance.revoke("cd" * 10) == ["cd" * 10]


def test_what_is_missing_or_expired_from_elsewhere_is_an_error(node: Node, elsewhere: Node) -> None:
    node.issuance.init()
    provide(node, elsewhere, "auth")
    with pytest.raises(UserError, match=r"https\.pem: there is no such file.* pki issue https --name HOST --out https"):
        elsewhere.issuance.ensure(("auth", "https"))
    elsewhere.clock.advance(25 * 3600)
    with pytest.raises(UserError, match=r"auth\.pem: the certificate has expired"):
        elsewhere.issuance.ensure(("auth",))
    with pytest.raises(UserError, match=r"pool\.pem: there is no such file.* helixflow pki issue pool --out pool\.pem"):
        elsewhere.issuance.ensure(("pool",))
