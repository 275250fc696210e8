"""Who calls: from the Authorization header to a `Principal`."""

from collections.abc import Callable
from hashlib import sha256
from typing import Final

from helixflow.clients.keys import KeyResolver
from helixflow.clients.tokens import TokenVerifier
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.keys import PREFIX, is_well_formed
from helixflow.core.principal import Principal
from helixflow.gateway.client_address import ClientAddresses, is_within
from helixflow.gateway.exchange import Exchange

_MAX_KEY_BYTES: Final = 512
# How a JSON object begins in base64url: no key does.
_TOKEN_PREFIX: Final = b"eyJ"
_KEY_HEADER: Final = b"Bearer " + PREFIX.encode()
_TOKEN_HEADER: Final = b"Bearer " + _TOKEN_PREFIX
_SCHEME_LENGTH: Final = len(b"Bearer ")


class Identification:
    """Resolves API keys and access tokens, from their caches where possible."""

    def __init__(self, keys: KeyResolver, tokens: TokenVerifier, addresses: ClientAddresses) -> None:
        self._keys = keys
        self._tokens = tokens
        self._addresses = addresses

    def recall(self, exchange: Exchange) -> Principal | None:
        """Who calls, if the usual form of the header is used and the credential is cached; otherwise `identify` knows
        more.
        """
        header = exchange.headers.get(b"authorization")
        if header is None:
            return None
        # A connection's requests have the same credential as a rule: it is looked at and hashed once.
        memory = exchange.connection
        known = memory.get("credential")
        if known is None or known[0] != header:
            if (found := self._find_cache(header)) is None:
                return None
            known = memory["credential"] = (header, *found)
        principal: Principal | None = known[1](known[2])
        if principal is None or principal.networks is not None:
            return None
        return principal

    async def identify(self, exchange: Exchange) -> Principal:
        """Raises `HelixError`: INVALID_API_KEY, INVALID_TOKEN, UNAVAILABLE when the credential is not cached and auth
        cannot be asked, PERMISSION_DENIED from an address that the key is not for.
        """
        credential = _bearer(exchange.headers.get(b"authorization"))
        if credential.startswith(_TOKEN_PREFIX):
            principal = self._tokens.verify(credential)
        else:
            principal = await self._resolve(credential)
        exchange.principal = principal
        if principal.networks is not None:
            address = self._addresses.find(exchange)
            if address is None or not is_within(address, principal.networks):
                raise HelixError(
                    ErrorKind.PERMISSION_DENIED, "Your address is not among the networks that this API key is for."
                )
        return principal

    async def _resolve(self, key: bytes) -> Principal:
        key_hash = sha256(key).digest()
        principal = self._keys.cached(key_hash)
        if principal is None:
            if len(key) > _MAX_KEY_BYTES or not key.isascii() or not is_well_formed(key.decode("ascii")):
                raise _invalid("The API key is malformed or mistyped. Check it and send 'Authorization: Bearer <key>'.")
            principal = await self._keys.resolve(key_hash)
        return principal

    def _find_cache(self, header: bytes) -> tuple[Callable[[bytes], Principal | None], bytes] | None:
        """Where the credential may be cached, and under what."""
        if header.startswith(_KEY_HEADER):
            return self._keys.cached, sha256(header[_SCHEME_LENGTH:]).digest()
        if header.startswith(_TOKEN_HEADER):
            return self._tokens.cached, header[_SCHEME_LENGTH:]
        return None


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
