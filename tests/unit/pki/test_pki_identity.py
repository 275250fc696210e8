import errno
from pathlib import Path

import pytest
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from helixflow.core.errors import UserError
from helixflow.pki.certificates import KeyPair
from helixflow.pki.identity import ServiceIdentity
from tests.unit.pki.conftest import Node


@pytest.fixture
def identity(node: Node) -> ServiceIdentity:
    node.issuance.ensure()
    return ServiceIdentity(node.folder, "helixflow.internal", "gateway", clock=node.clock)


def test_a_renewed_certificate_is_taken_over_once(node: Node, identity: ServiceIdentity) -> None:
    before = identity.credential
    identity.refresh()
    assert (identity.version, identity.credential) == (0, before)
    node.issuance.rotate()
    identity.refresh()
    assert identity.version == 1
    assert identity.credential.chain != before.chain
    assert identity.credential.key != before.key
    identity.refresh()
    assert identity.version == 1


@pytest.mark.parametrize("content", [b"", b"-----BEGIN PRIVATE KEY-----\nMIG", b"\xff\x00"])
def test_what_cannot_be_used_is_refused_and_the_present_one_stays(
    node: Node, identity: ServiceIdentity, content: bytes
) -> None:
    before = identity.credential
    node.folder.service_file("gateway").write_bytes(content)
    with structlog.testing.capture_logs() as logs:
        identity.refresh()
        identity.refresh()
    assert identity.credential is before
    (record,) = logs
    assert record["event"] == "identity.refused"
    assert str(node.folder.service_file("gateway")) in record["reason"]
    node.issuance.rotate()
    identity.refresh()
    assert identity.version == 1


def test_a_file_that_is_gone_for_a_moment_does_no_harm(node: Node, identity: ServiceIdentity) -> None:
    path = node.folder.service_file("gateway")
    path.rename(path.with_suffix(".away"))
    identity.refresh()
    assert identity.version == 0
    path.with_suffix(".away").rename(path)
    identity.refresh()
    assert identity.credential.expires_at == node.clock.now() + 24 * 3600


def test_what_was_unreadable_for_a_moment_is_tried_again(
    node: Node, identity: ServiceIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.issuance.rotate()
    revoked = int(node.issuance.revoke("console")[0], 16)

    def fail(path: Path, mode: str) -> None:
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    with monkeypatch.context() as patch, structlog.testing.capture_logs() as logs:
        patch.setattr(Path, "open", fail)
        for _ in range(3):
            identity.refresh()
    assert [record["event"] for record in logs] == ["identity.refused", "revocations.refused"]
    assert (identity.version, identity.revoked) == (0, frozenset())
    identity.refresh()
    assert identity.version == 1
    assert revoked in identity.revoked


def test_a_certificate_whose_extensions_cannot_be_read_is_refused(node: Node, identity: ServiceIdentity) -> None:
    path = node.folder.service_file("gateway")
    pair = KeyPair.parse(path.read_bytes())
    present = pair.certificate
    builder = x509.CertificateBuilder(
        present.issuer,
        present.subject,
        present.public_key(),
        present.serial_number,
        present.not_valid_before_utc,
        present.not_valid_after_utc,
    )
    broken = x509.UnrecognizedExtension(x509.SubjectAlternativeName.oid, b"\x30\x03\xff")
    certificate = builder.add_extension(broken, critical=False).sign(pair.key, hashes.SHA256())
    path.write_bytes(KeyPair(pair.key, (certificate,)).pem())
    with structlog.testing.capture_logs() as logs:
        identity.refresh()
    (record,) = logs
    assert "extensions cannot be read" in record["reason"]
    assert identity.version == 0


def test_the_identity_of_another_service_is_refused(node: Node, identity: ServiceIdentity) -> None:
    pem = node.folder.service_file("control").read_bytes()
    node.folder.service_file("gateway").write_bytes(pem)
    identity.refresh()
    assert identity.version == 0
    with pytest.raises(UserError, match=r"not that of spiffe://helixflow\.internal/gateway"):
        ServiceIdentity(node.folder, "helixflow.internal", "gateway", clock=node.clock)


def test_new_roots_and_revocations_are_taken_over(node: Node, identity: ServiceIdentity) -> None:
    roots = identity.credential.roots
    node.issuance.trust_successor(None, None, settle=identity.refresh)
    assert identity.version == 1
    assert identity.credential.roots.endswith(roots)
    revoked = int(node.issuance.revoke("console")[0], 16)
    assert revoked not in identity.revoked
    identity.refresh()
    assert revoked in identity.revoked
    node.folder.revoked.write_bytes(b"{")
    identity.refresh()
    assert revoked in identity.revoked


def test_an_unreadable_file_names_itself(node: Node, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gateway\.pem: there is no such file; run: helixflow pki init"):
        ServiceIdentity(node.folder, "helixflow.internal", "gateway", clock=node.clock)
    node.issuance.ensure()
    node.folder.service_file("gateway").unlink()
    node.folder.service_file("gateway").mkdir()
    with pytest.raises(UserError, match=r"gateway\.pem: cannot be read"):
        ServiceIdentity(node.folder, "helixflow.internal", "gateway", clock=node.clock)


def test_no_key_in_its_repr(identity: ServiceIdentity) -> None:
    assert "PRIVATE" not in repr(identity) + repr(identity.credential)
