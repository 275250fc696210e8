"""Mutual TLS of gRPC from a `ServiceIdentity`: what both sides show, and whom they believe.

Between our own processes TLS 1.3 is negotiated. grpcio offers no way to forbid 1.2, which BoringSSL then restricts to
ECDHE with AEAD; `rpc.peers` refuses calls that came over it. Nor can a client look up revocations: what protects it
from a server with a stolen key is the certificate's short life.
"""

from typing import Any

import grpc

from helixflow.pki.identity import Credential, ServiceIdentity


def channel_credentials(credential: Credential) -> grpc.ChannelCredentials:
    """What a client shows. It never changes for a channel: see `RenewingChannel`."""
    return grpc.ssl_channel_credentials(credential.roots, credential.key, credential.chain)


def server_credentials(identity: ServiceIdentity) -> grpc.ServerCredentials:
    """What one port of a server shows: at every handshake the newest of `identity`; a client certificate is a must.

    Good for a single port: gRPC takes the first configuration away from the credentials.
    """
    shown = identity.version

    def fetch() -> Any:
        # Called by gRPC's threads, one handshake at a time; None means no change.
        nonlocal shown
        version = identity.version
        if version == shown:
            return None
        shown = version
        return _configuration(identity.credential)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(identity.credential), fetch, require_client_authentication=True
    )


def _configuration(credential: Credential) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(credential.key, credential.chain)], credential.roots)
