"""Who calls: from the Authorization header to a `Principal`."""

from hashlib import sha256

from helixflow.clients.auth import KeyResolver
from helixflow.core.call import Principal
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.keys import is_well_formed
from helixflow.gateway.exchange import Exchange

_MAX_KEY_BYTES = 512


class Identification:
    """Resolves API keys, from the cache where possible."""

    def __init__(self, resolver: KeyResolver) -> None:
        self._resolver = resolver

    async def identify(self, exchange: Exchange) -> Principal:
        """Raises `HelixError` INVALID_API_KEY, or UNAVAILABLE when the key is not cached and auth cannot be asked."""
        key = _bearer(exchange.headers.get(b"authorization"))
        key_hash = sha256(key).digest()
        principal = self._resolver.cached(key_hash)
        if principal is None:
            if len(key) > _MAX_KEY_BYTES or not key.isascii() or not is_well_formed(key.decode("ascii")):
                raise _invalid("The API key is malformed or mistyped. Check it and send 'Authorization: Bearer <key>'.")
            principal = await self._resolver.resolve(key_hash)
        return principal


def _bearer(header: bytes | None) -> bytes:
    if header is None:
        raise _invalid("You sent no API key. Send it as 'Authorization: Bearer <key>'.")
    if header.startswith(b"Bearer hfk_"):
        return header[7:].rstrip()
    scheme, _, key = header.strip().partition(b" ")
    key = key.strip()
    if scheme.lower() != b"bearer" or not key:
        raise _invalid("The Authorization header is not of the form 'Bearer <key>'.")
    return key


def _invalid(message: str) -> HelixError:
    return HelixError(ErrorKind.INVALID_API_KEY, message)
