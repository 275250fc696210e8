"""Channels to our own services, all with the same limits."""

from pathlib import Path
from urllib.parse import quote

import grpc

MAX_MESSAGE_BYTES = 4 * 2**20
KEEPALIVE_S = 10
KEEPALIVE_TIMEOUT_S = 5

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
    # Else the path of the socket is sent as the authority.
    ("grpc.default_authority", "localhost"),
    # A service on this machine is back within moments: do not sit out the default of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Channels to one path must not share a connection (and its state) behind our back.
    ("grpc.use_local_subchannel_pool", 1),
)


def target_of(socket: Path) -> str:
    """gRPC's name for a Unix socket. It parses the name as a URI, so that `#`, `?` and `%` must be quoted."""
    return "unix:" + quote(str(socket))


def create_channel(socket: Path) -> grpc.aio.Channel:
    """A channel to the service on `socket`. It connects on the first call and again whenever needed."""
    return grpc.aio.insecure_channel(target_of(socket), options=_CHANNEL)
