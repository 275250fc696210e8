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

    def recall(self, exchange: Exchange) -> Principal | None:
        """Who calls, if the usual form of the header is used and the key is cached; otherwise `identify` knows more."""
        header = exchange.headers.get(b"authorization")
        if header is None or not header.startswith(b"Bearer hfk_"):
            return None
        # A connection's requests have the same key as a rule: it is hashed once.
        memory = exchange.connection
        known = memory.get("key")
        if known is None or known[0] != header:
            known = memory["key"] = (header, sha256(header[7:]).digest())
        return self._resolver.cached(known[1])

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
    scheme, _, key = header.strip().partition(b" ")
    key = key.strip()
    if scheme.lower() != b"bearer" or not key:
        raise _invalid("The Authorization header is not of the form 'Bearer <key>'.")
    return key


def _invalid(message: str) -> HelixError:
    return HelixError(ErrorKind.INVALID_API_KEY, message)
