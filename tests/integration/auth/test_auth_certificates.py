"""Certificates of nodes without an authority: who has one gets the next one, and nobody anything else."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from sqlalchemy import select

from helixflow.auth.certificates import CertificateService
from helixflow.auth.changes import ChangeFeed
from helixflow.auth.unit import Units
from helixflow.clients.certificates import CertificateRenewal
from helixflow.core.clock import FakeClock, SystemClock
from helixflow.core.errors import ErrorKind, UserError
from helixflow.pki.certificates import KeyPair, create_request, life_of, names_of
from helixflow.pki.files import PkiFolder
from helixflow.pki.identity import ServiceIdentity
from helixflow.pki.issuing import Issuance
from helixflow.pki.names import parse_names
from helixflow.pki.renewal import Successor
from helixflow.rpc.channels import create_channel
from helixflow.rpc.errors import from_rpc_error
from helixflow.rpc.generated.auth_v1 import certificates_pb2 as pb
from helixflow.rpc.generated.auth_v1 import certificates_pb2_grpc
from helixflow.rpc.servers import create_server, listen_tcp
from helixflow.storage.engine import Database
from helixflow.storage.schema import audit_records
from tests.harness.pki import Pki, allow

SERVICE = pb.DESCRIPTOR.services_by_name["CertificateService"].full_name
HOUR = 3600.0
pytestmark = pytest.mark.parametrize("database_settings", ["sqlite"], indirect=True)


class Fleet:
    """A node with the authority, and one with a pool whose certificate is `age_h` of its 24 hours old."""

    def __init__(self, tmp_path: Path, *, age_h: float) -> None:
        self.near = Pki(tmp_path / "near")
        past = FakeClock(time.time() - age_h * HOUR)
        self.pem = Issuance(self.near.settings, clock=past).issue_elsewhere("pool", parse_names(["gpu-1.example.com"]))
        self.far = PkiFolder(tmp_path / "far" / "pki")
        self.far.prepare()
        self.far.ca_certificate.write_bytes(self.near.folder.ca_certificate.read_bytes())
        self.path = self.far.service_file("pool")
        self.path.write_bytes(self.pem)
        self.path.chmod(0o600)

    @property
    def certificate(self) -> x509.Certificate:
        return KeyPair.parse(self.path.read_bytes()).certificate

    @asynccontextmanager
    async def serving(self, database: Database) -> AsyncIterator[grpc.aio.Channel]:
        """CertificateService; the channel to it of the pool."""
        clock = SystemClock()
        own = self.near.identity("auth")
        server = create_server(own, allow(SERVICE, peers=("pool",)))
        units = Units(database, clock, ChangeFeed(database, clock))
        service = CertificateService(units, Issuance(self.near.settings))
        certificates_pb2_grpc.add_CertificateServiceServicer_to_server(service, server)
        port = await listen_tcp(server, "127.0.0.1", 0, own)
        await server.start()
        identity = ServiceIdentity(self.far, self.near.settings.pki.trust_domain, "pool")
        following = [asyncio.create_task(own.follow()), asyncio.create_task(identity.follow())]
        try:
            async with create_channel(f"127.0.0.1:{port}", identity, "auth") as channel:
                yield channel
        finally:
            await server.stop(0)
            for task in following:
                task.cancel()
            await asyncio.gather(*following, return_exceptions=True)


async def renew(channel: grpc.aio.Channel, request: bytes = b"") -> pb.RenewCertificateResponse:
    stub = certificates_pb2_grpc.CertificateServiceStub(channel)
    return await stub.RenewCertificate(
        pb.RenewCertificateRequest(signing_request=request or create_request()[1]), timeout=60
    )


async def refusal(channel: grpc.aio.Channel, request: bytes = b"") -> ErrorKind:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await renew(channel, request)
    return from_rpc_error(caught.value).kind


async def test_a_pool_has_its_next_certificate_in_time_and_that_is_on_record(
    tmp_path: Path, database: Database
) -> None:
    fleet = Fleet(tmp_path, age_h=20)
    before = fleet.certificate
    async with fleet.serving(database) as channel:
        renewing = asyncio.create_task(CertificateRenewal(channel, Successor(fleet.far, "pool")).run())
        async with asyncio.timeout(60):
            while fleet.certificate == before:
                await asyncio.sleep(0.02)
        renewing.cancel()
        after = fleet.certificate
        assert names_of(after) == names_of(before), "the further name too"
        assert abs(life_of(after) - life_of(before)) < HOUR
        assert after.public_key() != before.public_key()
        assert fleet.path.stat().st_mode & 0o777 == 0o600
        ServiceIdentity(fleet.far, fleet.near.settings.pki.trust_domain, "pool")  # a pool starts with it
        async with database.reading() as connection:
            rows = (await connection.execute(select(audit_records).where(audit_records.c.organisation_id == ""))).all()
    (row,) = rows
    assert row.action == "renew_certificate"
    assert row.target_id == f"{after.serial_number:x}"
    assert f"{after.serial_number:x}" in fleet.near.issuance.revoke("pool"), "and so it can be taken back"


async def test_nothing_is_issued_to_who_may_not_have_it(tmp_path: Path, database: Database) -> None:
    fleet = Fleet(tmp_path, age_h=20)
    issued = len(fleet.near.issuance.register.issued())
    async with fleet.serving(database) as channel:
        assert await refusal(channel, b"nonsense") is ErrorKind.INVALID_VALUE
        request = bytearray(create_request()[1])
        request[-1] ^= 1
        assert await refusal(channel, bytes(request)) is ErrorKind.INVALID_VALUE, "it has not got that key"
        assert len(fleet.near.issuance.register.issued()) == issued
        assert (await renew(channel)).chain
        assert await refusal(channel) is ErrorKind.RATE_LIMITED
        fleet.near.issuance.revoke("pool")
        async with asyncio.timeout(60):
            while await refusal(channel) is not ErrorKind.PERMISSION_DENIED:
                await asyncio.sleep(0.05)
    young = Fleet(tmp_path / "young", age_h=2)
    async with young.serving(database) as channel:
        assert await refusal(channel) is ErrorKind.PRECONDITION_FAILED


async def test_what_cannot_be_used_is_not_taken_over(tmp_path: Path, database: Database) -> None:
    fleet = Fleet(tmp_path, age_h=20)
    other = Pki(tmp_path / "other")
    successor = Successor(fleet.far, "pool")
    strange = KeyPair.parse(other.issuance.issue_elsewhere("pool", parse_names(["gpu-1.example.com"])))
    for chain in (b"", b"rubbish", strange.chain_pem()):
        successor.request()
        with pytest.raises(UserError, match="cannot be used"):
            successor.accept(chain)
    assert fleet.path.read_bytes() == fleet.pem
