"""How often one address may try to sign in: guessing passwords is bounded elsewhere, the work that it costs is here."""

from helixflow.core.clock import Clock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.gateway.client_address import Address
from helixflow.gateway.exchange import Exchange
from helixflow.metering.gcra import Bucket

_PUBLIC = "/api/v1/auth/"
_WINDOW_US = 60_000_000
# Ten seconds of it at once.
_BURST_SHARE = 6
# Addresses remembered; the one that was seen first goes first.
_MAX_ADDRESSES = 10_000
# Whoever has one IPv6 address has the network.
_NETWORK_BITS = 64


class SignInRate:
    """Counts POSTs to the paths of sign-in by address, at most `per_minute`."""

    def __init__(self, per_minute: int, clock: Clock) -> None:
        self._per_minute = per_minute
        self._burst = max(per_minute // _BURST_SHARE, 1)
        self._monotonic = clock.monotonic
        self._buckets: dict[int, Bucket] = {}

    def check(self, exchange: Exchange, address: Address | None) -> None:
        """Raises `HelixError` TOO_MANY_ATTEMPTS. A peer without an address is this machine's own."""
        if address is None or exchange.method != "POST" or not exchange.path.startswith(_PUBLIC):
            return
        bits = int(address) >> _NETWORK_BITS if address.version == 6 else int(address)
        now_us = int(self._monotonic() * 1e6)
        bucket = self._buckets.get(bits)
        if bucket is None:
            if len(self._buckets) >= _MAX_ADDRESSES:
                del self._buckets[next(iter(self._buckets))]
            bucket = self._buckets[bits] = Bucket(self._per_minute, _WINDOW_US, self._burst)
        if not bucket.take(now_us, 1):
            raise HelixError(
                ErrorKind.TOO_MANY_ATTEMPTS,
                "Too many attempts to sign in come from your address. Try again later.",
                retry_after_s=bucket.wait_us(now_us, 1) / 1e6,
            )
