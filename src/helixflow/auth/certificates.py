"""CertificateService: who still has a certificate gets the next one."""

import asyncio
from typing import Any, Final

import grpc
import structlog

from helixflow.auth.audit.entry import INSTALLATION
from helixflow.auth.caller import Caller, CallerKind
from helixflow.auth.unit import Units
from helixflow.core.errors import ErrorKind, HelixError, UserError
from helixflow.pki.certificates import life_of, read_request, to_pem
from helixflow.pki.issuing import Issuance
from helixflow.rpc.access import Access, Level
from helixflow.rpc.generated.auth_v1 import certificates_pb2 as pb
from helixflow.rpc.generated.auth_v1 import certificates_pb2_grpc
from helixflow.rpc.peers import certificate_of, peer_of

# Who has not got the answer asks again; nobody makes certificates in numbers.
AGAIN_S: Final = 60.0
_ACCESS: Final = Access(Level.SERVICE, None, writes=True, idempotent=False)
_SYSTEM: Final = Caller(CallerKind.SYSTEM, name="certificates")
_Context = grpc.aio.ServicerContext[Any, Any]

log = structlog.get_logger("helixflow.auth")


class CertificateService(certificates_pb2_grpc.CertificateServiceServicer):
    """Issues for a peer what it has already, and nothing else. Every certificate is in the register of the authority,
    where it can be revoked, and in the audit log of the installation. Errors are `HelixError`s.

    The peer interceptor has refused who shows a revoked or expired certificate.
    """

    def __init__(self, units: Units, issuance: Issuance) -> None:
        self._units = units
        self._issuance = issuance
        # Until when those that were just renewed are not renewed again, by serial.
        self._renewed: dict[int, float] = {}

    async def RenewCertificate(
        self, request: pb.RenewCertificateRequest, context: _Context
    ) -> pb.RenewCertificateResponse:
        peer, shown = peer_of(context), certificate_of(context)
        now = self._units.now
        if now < shown.not_valid_before_utc.timestamp() + life_of(shown) / 2:
            raise HelixError(ErrorKind.PRECONDITION_FAILED, "Half of the certificate's life is not over yet.")
        again_s = min(AGAIN_S, life_of(shown) / 20)
        self._renewed = {serial: until for serial, until in self._renewed.items() if until > now}
        if peer.serial in self._renewed:
            raise HelixError(ErrorKind.RATE_LIMITED, "The certificate has just been renewed.", retry_after_s=again_s)
        try:
            key = read_request(request.signing_request)
        except ValueError as exc:
            raise HelixError(ErrorKind.INVALID_VALUE, f"Not renewed: {exc}.", param="signing_request") from exc
        if self._issuance.is_elsewhere():
            raise HelixError(
                ErrorKind.PRECONDITION_FAILED, "The auth service has no authority: certificates are issued elsewhere."
            )
        self._renewed[peer.serial] = now + again_s
        try:
            chain = await asyncio.to_thread(self._issuance.issue_successor, shown, peer.service, key)
        except (UserError, ValueError) as exc:
            del self._renewed[peer.serial]
            log.error("certificate.not_renewed", peer=peer.service, serial=f"{peer.serial:x}", reason=str(exc))
            raise HelixError(ErrorKind.UNAVAILABLE, "The authority cannot issue now.", retry_after_s=again_s) from exc
        before = {"serial": f"{peer.serial:x}", "expires_at": int(peer.expires_at)}
        serial, expires_at = f"{chain[0].serial_number:x}", int(chain[0].not_valid_after_utc.timestamp())
        after = {"service": peer.service, "serial": serial, "expires_at": expires_at, "peer": context.peer()}
        # Who does not get it has an entry in the register more; one that was handed out is always recorded.
        async with self._units.writing(_SYSTEM, _ACCESS, "renew_certificate") as unit:
            unit.record("certificate", serial, before=before, after=after, organisation_id=INSTALLATION)
        log.info("certificate.renewed", peer=peer.service, serial=serial, replaces=before["serial"])
        return pb.RenewCertificateResponse(chain=to_pem(chain))
