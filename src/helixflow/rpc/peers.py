"""Who calls: the peer's identity from its verified certificate, and what it may call. Deny by default."""

from __future__ import annotations  # grpc's RpcMethodHandler is generic for type checkers only

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from functools import lru_cache
from typing import Any, Final

import grpc
import structlog
from cryptography import x509
from grpc_health.v1 import health  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from helixflow.core.clock import Clock, SystemClock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.pki.identity import ServiceIdentity
from helixflow.pki.peers import Peer, objection_to, read_peer

# Full name of a gRPC service, or of one of its methods (`package.Service/Method`), which is then ruled by that alone →
# the services that may call it.
Policy = Mapping[str, frozenset[str]]

_OPEN_TO_ALL_PEERS: Final = frozenset({health.SERVICE_NAME, reflection.SERVICE_NAME})
_TLS: Final = b"TLSv1.3"

log = structlog.get_logger("helixflow.rpc")


def peer_of(context: grpc.aio.ServicerContext[Any, Any]) -> Peer:
    """The peer of a call. Raises `HelixError` (PERMISSION_DENIED) when it showed no identity of a service."""
    try:
        return _read_peer(_shown(context))
    except ValueError as exc:
        raise _denied("The caller's certificate is not that of a service.") from exc


def certificate_of(context: grpc.aio.ServicerContext[Any, Any]) -> x509.Certificate:
    """The certificate that the peer of a call has shown, verified by the handshake. Raises `HelixError` as above."""
    return x509.load_pem_x509_certificate(_shown(context))


def _shown(context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
    shown = list(context.auth_context().get("x509_pem_cert", ()))
    if len(shown) != 1:
        raise _denied("The caller has shown no certificate.")
    return shown[0]


@lru_cache(maxsize=256)
def _read_peer(pem: bytes) -> Peer:
    """Cached: a peer makes all its calls with one certificate. Raises `ValueError`."""
    return read_peer(x509.load_pem_x509_certificate(pem))


class PeerInterceptor(grpc.aio.ServerInterceptor):
    """Ends calls of those who may not make them: PERMISSION_DENIED before the servicer sees anything.

    Refused are peers without an identity in our trust domain, with a revoked or meanwhile expired certificate, over
    anything older than TLS 1.3, and services that `policy` does not name for the called service. Health and reflection
    are open to all peers. Running streams of a peer that is revoked end. Goes inside `ErrorInterceptor`, which renders
    what is raised here.
    """

    def __init__(self, identity: ServiceIdentity, policy: Policy, *, clock: Clock | None = None) -> None:
        self._identity = identity
        self._policy = policy
        self._clock = clock if clock is not None else SystemClock()
        self._streams: dict[asyncio.Timeout, Peer] = {}
        identity.on_revocation(self._cut_off_revoked)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        # The types of grpc do not describe what a handler carries.
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        method = str(handler_call_details.method)
        serializers = (handler.request_deserializer, handler.response_serializer)
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(self._answering(handler.unary_unary, method), *serializers)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(self._answering(handler.stream_unary, method), *serializers)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(self._streaming(handler.unary_stream, method), *serializers)
        return grpc.stream_stream_rpc_method_handler(self._streaming(handler.stream_stream, method), *serializers)

    def admit(self, context: grpc.aio.ServicerContext[Any, Any], method: str) -> Peer:
        """The peer, if it may call `method` (`/package.Service/Method`). Raises `HelixError` (PERMISSION_DENIED)."""
        peer = peer_of(context)
        reason = self._objection(peer, context, method)
        if reason is not None:
            log.warning("peer.refused", peer=peer.service, method=method, serial=f"{peer.serial:x}", reason=reason)
            raise _denied(f"The service {peer.service} may not make this call: {reason}.")
        return peer

    def _objection(self, peer: Peer, context: grpc.aio.ServicerContext[Any, Any], method: str) -> str | None:
        if (reason := objection_to(peer, self._identity, self._clock.now())) is not None:
            return reason
        # grpcio 1.85 tells; where it did not, nothing is known and the handshake has decided.
        if any(version != _TLS for version in context.auth_context().get("ssl_tls_version", ())):
            return "it does not speak TLS 1.3"
        called = method.removeprefix("/")
        service = called.partition("/")[0]
        allowed = self._policy.get(called, self._policy.get(service, frozenset()))
        if service not in _OPEN_TO_ALL_PEERS and peer.service not in allowed:
            return "it has no permission"
        return None

    def _answering(self, behaviour: Callable[[Any, Any], Awaitable[Any]], method: str) -> Any:
        async def answer(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            self.admit(context, method)
            return await behaviour(request, context)

        return answer

    def _streaming(self, behaviour: Callable[[Any, Any], Any], method: str) -> Any:
        # A coroutine and no generator: only so does all of it run within the scope that a revocation ends.
        async def stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            peer = self.admit(context, method)
            try:
                async with asyncio.timeout(None) as scope:
                    self._streams[scope] = peer
                    try:
                        await _run(behaviour(request, context), context)
                    finally:
                        self._streams.pop(scope, None)
            except TimeoutError as exc:
                if not scope.expired():
                    raise
                log.warning("peer.cut_off", peer=peer.service, method=method, serial=f"{peer.serial:x}")
                raise _denied(f"The certificate of the service {peer.service} was revoked.") from exc

        return stream

    def _cut_off_revoked(self) -> None:
        """Ends the streams of peers that were revoked while they ran."""
        now = asyncio.get_running_loop().time()
        revoked = [scope for scope, peer in self._streams.items() if peer.serial in self._identity.revoked]
        for scope in revoked:
            # Once: a scope that ends already takes no new deadline.
            del self._streams[scope]
            scope.reschedule(now)


async def _run(answers: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    """Writes the messages of a servicer; one that writes them itself is awaited."""
    if isinstance(answers, AsyncGenerator):
        async with aclosing(answers):
            async for message in answers:
                await context.write(message)
    elif hasattr(answers, "__aiter__"):
        async for message in answers:
            await context.write(message)
    else:
        await answers


def _denied(message: str) -> HelixError:
    return HelixError(ErrorKind.PERMISSION_DENIED, message)
