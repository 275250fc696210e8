"""How a node without an authority keeps its certificate valid: it asks the auth service for the next one in time."""

import asyncio
from typing import Final

import grpc
import structlog

from helixflow.core.errors import HelixError, UserError
from helixflow.pki.renewal import Successor
from helixflow.rpc.errors import from_rpc_error
from helixflow.rpc.generated.auth_v1 import certificates_pb2 as pb
from helixflow.rpc.generated.auth_v1 import certificates_pb2_grpc

_TIMEOUT_S: Final = 30.0
# The file may be replaced by hand at any time.
_LOOK_S: Final = 600.0
_RETRY_S: Final = 60.0
_LEAST_PAUSE_S: Final = 0.2

log = structlog.get_logger("helixflow.pki")


class CertificateRenewal:
    """`run` it while the service runs; `channel` leads to the auth service, with the certificate as it is."""

    def __init__(self, channel: grpc.aio.Channel, successor: Successor) -> None:
        self._stub = certificates_pb2_grpc.CertificateServiceStub(channel)
        self._successor = successor
        self._failure = ""

    async def run(self) -> None:
        """Until cancelled. What keeps it from renewing is logged once and tried again."""
        while True:
            try:
                pause_s = await self._renew_when_due()
                self._failure = ""
            except HelixError as exc:
                pause_s = await self._tell(exc.message, _RETRY_S)
            except UserError as exc:
                # Somebody has to do something: what was issued in vain is not asked for every minute.
                pause_s = await self._tell(exc.message, _LOOK_S)
            await asyncio.sleep(max(_LEAST_PAUSE_S, pause_s))

    async def _renew_when_due(self) -> float:
        """Seconds until it is to be looked at again. Raises `HelixError` and `UserError`."""
        successor = self._successor
        wait_s = await asyncio.to_thread(successor.wait_s)
        if wait_s:
            return min(wait_s, _LOOK_S)
        request = pb.RenewCertificateRequest(signing_request=await asyncio.to_thread(successor.request))
        try:
            answer = await self._stub.RenewCertificate(request, timeout=_TIMEOUT_S)
        except grpc.RpcError as exc:
            raise from_rpc_error(exc) from exc
        await asyncio.to_thread(successor.accept, answer.chain)
        log.info("certificate.renewed", peer=successor.service)
        return _LEAST_PAUSE_S

    async def _tell(self, reason: str, pause_s: float) -> float:
        """Seconds until it is tried again: several times before the present one ends, however short its life is."""
        try:
            left_s = max(0.0, await asyncio.to_thread(self._successor.left_s))
        except UserError:
            left_s = 0.0  # the present one cannot be read: the reason says so
        if reason != self._failure:
            self._failure = reason
            log.warning(
                "certificate.not_renewed",
                peer=self._successor.service,
                reason=reason,
                hours_left=round(left_s / 3600, 1),
                advice="when none are left, nobody talks to this node: helixflow pki issue, on the first one",
            )
        return min(pause_s, left_s / 10) if left_s > 0 else pause_s
