import asyncio
import errno
import ssl
import tempfile
from pathlib import Path

import pytest
import structlog
from cryptography import x509

from helixflow.core.errors import UserError
from helixflow.pki.certificates import KeyPair, parse_certificates
from helixflow.pki.contexts import ServerContext
from tests.unit.pki.conftest import Node


@pytest.fixture
def files(node: Node) -> tuple[Path, Path]:
    """An operator's certificate and key."""
    node.issuance.ensure()
    folder = node.settings.data_dir
    replace(node, folder / "c.pem", folder / "k.pem")
    return folder / "c.pem", folder / "k.pem"


def replace(node: Node, certificate: Path, key: Path) -> x509.Certificate:
    node.issuance.issue("https")
    pair = KeyPair.parse(node.folder.service_file("https").read_bytes())
    key.touch(0o600)
    key.write_bytes(pair.key_pem())
    certificate.write_bytes(pair.chain_pem())
    return pair.certificate


def handshake(node: Node, server: ssl.SSLContext, **limits: ssl.TLSVersion) -> tuple[bytes, str | None, str | None]:
    """Certificate, version and protocol that a browser gets. Without sockets."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # The clock of these tests is not that of OpenSSL.
    context.set_alpn_protocols(["h2", "http/1.1"])
    for name, version in limits.items():
        setattr(context, name, version)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(down, up, server_hostname="localhost")
    peer = server.wrap_bio(up, down, server_side=True)
    pending = [client, peer, client, peer, client]
    for side in pending:
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    return client.getpeercert(binary_form=True) or b"", client.version(), client.selected_alpn_protocol()


async def test_tls_1_3_and_nothing_older(node: Node) -> None:
    node.issuance.ensure()
    context = ServerContext(node.folder.service_file("https"), clock=node.clock).context
    certificate, version, protocol = handshake(node, context)
    assert x509.load_der_x509_certificate(certificate) == node.certificate("https")
    assert (version, protocol) == ("TLSv1.3", "http/1.1")
    with pytest.raises(ssl.SSLError):
        handshake(node, context, maximum_version=ssl.TLSVersion.TLSv1_2)


async def test_a_changed_pair_serves_new_connections(node: Node, files: tuple[Path, Path]) -> None:
    server = ServerContext(*files, clock=node.clock)
    context = server.context
    assert not await server.reload_if_changed()
    new = replace(node, *files)
    assert await server.reload_if_changed()
    assert server.context is context
    assert x509.load_der_x509_certificate(handshake(node, context)[0]) == new
    assert not await server.reload_if_changed()


async def test_a_pair_that_does_not_match_yet_is_refused_and_the_old_one_stays(
    node: Node, files: tuple[Path, Path]
) -> None:
    server = ServerContext(*files, clock=node.clock)
    old = parse_certificates(files[0].read_bytes())[0]
    new_certificate, new_key = (node.settings.data_dir / name for name in ("new-c.pem", "new-k.pem"))
    new = replace(node, new_certificate, new_key)
    halves = [b"", new_certificate.read_bytes()[:300], new_certificate.read_bytes()]
    for half in halves:
        files[0].write_bytes(half)
        with structlog.testing.capture_logs() as logs:
            assert not await server.reload_if_changed()
        assert [record["event"] for record in logs] == ["https_certificate.refused"]
        assert x509.load_der_x509_certificate(handshake(node, server.context)[0]) == old
    new_key.rename(files[1])
    assert await server.reload_if_changed()
    assert x509.load_der_x509_certificate(handshake(node, server.context)[0]) == new


async def test_without_room_for_temporary_files_the_old_pair_stays_until_there_is_some(
    node: Node, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ServerContext(*files, clock=node.clock)
    old = parse_certificates(files[0].read_bytes())[0]
    new = replace(node, *files)

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, structlog.testing.capture_logs() as logs:
        patch.setattr(tempfile, "NamedTemporaryFile", full)
        for _ in range(3):
            assert not await server.reload_if_changed()
    (record,) = logs
    assert (record["event"], record["log_level"]) == ("https_certificate.refused", "error")
    assert "No space left on device; make room there" in record["reason"]
    assert x509.load_der_x509_certificate(handshake(node, server.context)[0]) == old
    assert await server.reload_if_changed()
    assert x509.load_der_x509_certificate(handshake(node, server.context)[0]) == new


async def test_an_expired_certificate_is_refused(node: Node, files: tuple[Path, Path]) -> None:
    node.clock.advance(25 * 3600)
    with pytest.raises(UserError, match="has expired"):
        ServerContext(*files, clock=node.clock)


async def test_what_is_wrong_is_named(node: Node, files: tuple[Path, Path]) -> None:
    certificate, key = files
    key.chmod(0o644)
    with pytest.raises(UserError, match=f"chmod 600 {key}"):
        ServerContext(certificate, key, clock=node.clock)
    key.unlink()
    with pytest.raises(UserError, match=f"{key}: there is no such file"):
        ServerContext(certificate, key, clock=node.clock)


async def test_following_ends_with_its_task(node: Node, files: tuple[Path, Path]) -> None:
    server = ServerContext(*files, clock=node.clock)
    task = asyncio.create_task(server.follow())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
