"""TLS towards upstreams is verified: certificates made by openssl for the test."""

import asyncio
import shutil
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.transport.client import HttpClient, Timeouts, build_head
from helixflow.transport.origin import Origin
from helixflow.transport.testing import ScriptedUpstream, answer
from helixflow.transport.tls import client_context


@dataclass(frozen=True, slots=True)
class Certificates:
    ca: Path
    good: ssl.SSLContext
    wrong_name: ssl.SSLContext


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    if shutil.which("openssl") is None:
        pytest.fail("these tests need the openssl command: apt-get install openssl, or brew install openssl")
    folder = tmp_path_factory.mktemp("tls")
    ca, ca_key = folder / "ca.pem", folder / "ca.key"
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    _openssl("req", "-x509", *curve, "-keyout", ca_key, "-out", ca, "-days", "2", "-subj", "/CN=test CA")

    def server(name: str, alternative: str) -> ssl.SSLContext:
        certificate, key, request = folder / f"{name}.pem", folder / f"{name}.key", folder / f"{name}.csr"
        extensions = folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName={alternative}\n")
        _openssl("req", *curve, "-keyout", key, "-out", request, "-subj", f"/CN={name}")
        signing = ("-CA", ca, "-CAkey", ca_key, "-CAcreateserial", "-days", "2", "-extfile", extensions)
        _openssl("x509", "-req", "-in", request, "-out", certificate, *signing)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate, key)
        return context

    return Certificates(ca, server("good", "IP:127.0.0.1"), server("wrong", "DNS:example.org"))


async def fetch(context: ssl.SSLContext | None, origin: Origin) -> tuple[int, bytes]:
    client = HttpClient(ssl_context=context)
    try:
        async with asyncio.timeout(60):
            head = build_head("GET", "/", origin, [])
            response = await client.request(origin, head, b"", timeouts=Timeouts())
            return response.status, await response.read_all(100)
    finally:
        await client.close()


async def test_a_trusted_server_is_served_and_its_connection_reused(certificates: Certificates) -> None:
    client = HttpClient(ssl_context=client_context(certificates.ca))
    scripts = [[answer(b"a" * 200_000)], [answer(b"b")]]
    async with asyncio.timeout(60), ScriptedUpstream(scripts, ssl_context=certificates.good) as upstream:
        for _ in scripts:
            head = build_head("GET", "/", upstream.origin, [])
            response = await client.request(upstream.origin, head, b"", timeouts=Timeouts())
            assert (await response.read_all(2**20))[:1] in (b"a", b"b")
        assert [r.connection for r in upstream.requests] == [0, 0]
        await client.close()


@pytest.mark.parametrize("case", ["unknown CA", "wrong name", "TLS 1.1"])
async def test_a_server_that_cannot_be_trusted_gets_no_request(certificates: Certificates, case: str) -> None:
    server = certificates.wrong_name if case == "wrong name" else certificates.good
    trusted = None if case == "unknown CA" else client_context(certificates.ca)
    if case == "TLS 1.1" and trusted is not None:
        assert trusted.minimum_version is ssl.TLSVersion.TLSv1_2
        trusted.minimum_version = ssl.TLSVersion.TLSv1_3
        certificates.good.maximum_version = ssl.TLSVersion.TLSv1_2  # stands for any version below the client's least
    async with ScriptedUpstream([[answer(b"secret")]], ssl_context=server) as upstream:
        try:
            with pytest.raises(HelixError) as caught:
                await fetch(trusted, Origin("https", "127.0.0.1", upstream.port))
        finally:
            certificates.good.maximum_version = ssl.TLSVersion.MAXIMUM_SUPPORTED
        assert caught.value.kind is ErrorKind.UPSTREAM_UNAVAILABLE
        assert isinstance(caught.value.__cause__, OSError)
        assert upstream.requests == []


def test_contexts_always_verify(certificates: Certificates) -> None:
    for context in (client_context(), client_context(certificates.ca)):
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.check_hostname
        assert context.minimum_version is ssl.TLSVersion.TLSv1_2
