"""Channels to our own services, all with the same limits and mutual TLS."""

from pathlib import Path
from urllib.parse import quote

import grpc

from helixflow.pki.identity import ServiceIdentity
from helixflow.pki.names import server_name
from helixflow.rpc.credentials import channel_credentials
from helixflow.rpc.renewing import RenewingChannel

MAX_MESSAGE_BYTES = 4 * 2**20
KEEPALIVE_S = 10
KEEPALIVE_TIMEOUT_S = 5
# A watch stands again soon after its service does: what is revoked from then on is refused within a second.
MAX_RECONNECT_BACKOFF_S = 0.25

# A peer that is stopped or gone without a word is noticed after KEEPALIVE_S + KEEPALIVE_TIMEOUT_S.
COMMON_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
    # The keepalive is a ping, and it is this limit (default 60 s) that ends a silent connection: tried with SIGSTOP.
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
    ("grpc.http2.max_pings_without_data", 0),
)
_CHANNEL: tuple[tuple[str, int | str], ...] = (
    *COMMON_OPTIONS,
    # Traffic between our own processes never leaves for a proxy that the environment names.
    ("grpc.enable_http_proxy", 0),
    # A service on this machine is back within moments: do not sit out the default of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", int(MAX_RECONNECT_BACKOFF_S * 1000)),
    # Channels to one path must not share a connection (and its state) behind our back.
    ("grpc.use_local_subchannel_pool", 1),
)


def target_of(socket: Path) -> str:
    """gRPC's name for a Unix socket. It parses the name as a URI, so that `#`, `?` and `%` must be quoted."""
    return "unix:" + quote(str(socket))


def create_channel(target: Path | str, identity: ServiceIdentity, service: str) -> grpc.aio.Channel:
    """A channel to `service` on a Unix socket (a path) or at `host:port`, calling as `identity`.

    It connects on the first call and again whenever needed, and only to who shows the certificate of `service`. New
    calls use the newest certificate of `identity`, running ones go on as they began.
    """
    options = _options(identity, service)

    def connect() -> grpc.aio.Channel:
        return grpc.aio.secure_channel(_name(target), channel_credentials(identity.credential), options=options)

    return RenewingChannel(connect, lambda: identity.version)


def create_blocking_channel(target: Path | str, identity: ServiceIdentity, service: str) -> grpc.Channel:
    """As `create_channel` for code without an event loop; its certificate stays as it is."""
    credentials = channel_credentials(identity.credential)
    return grpc.secure_channel(_name(target), credentials, options=_options(identity, service))


def _name(target: Path | str) -> str:
    return target_of(target) if isinstance(target, Path) else target


def _options(identity: ServiceIdentity, service: str) -> tuple[tuple[str, int | str], ...]:
    # Also becomes the authority; else the path of a socket is sent as such.
    return (*_CHANNEL, ("grpc.ssl_target_name_override", server_name(identity.trust_domain, service)))
