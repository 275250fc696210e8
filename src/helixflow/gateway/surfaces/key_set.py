"""The public keys that access tokens are signed with, for whoever wants to verify them."""

import base64
from typing import Final

import msgspec

from helixflow.clients.changes import ChangeWatch
from helixflow.core.claims import ALGORITHM
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.gateway.exchange import Exchange

PATH = "/.well-known/jwks.json"
# A key is announced ten seconds before it signs (`auth.signing_key_rotation`): whoever keeps the set for five knows of
# it by then, with time left for the gateways to be told. The first key has less; until there is one, nothing is kept.
_KEPT: Final = (b"cache-control", b"public, max-age=5")
_NOT_KEPT: Final = (b"cache-control", b"no-store")


class KeySetSurface:
    """Shows the keys that the watch has brought."""

    def __init__(self, watch: ChangeWatch) -> None:
        self._watch = watch

    async def show(self, exchange: Exchange) -> None:
        """A JWK Set (RFC 7517, section 5). UNAVAILABLE until the keys are known."""
        if not self._watch.has_watched:
            raise HelixError(
                ErrorKind.UNAVAILABLE, "The signing keys are not known yet: the auth service has not answered."
            )
        keys = [
            {
                "kty": "RSA",
                "use": "sig",
                "alg": ALGORITHM,
                "kid": key.kid,
                "n": _base64url(key.modulus),
                "e": _base64url(key.exponent),
            }
            for key in self._watch.signing_keys
        ]
        body = msgspec.json.encode({"keys": keys})
        await exchange.reply(200, body, [_KEPT if keys else _NOT_KEPT])


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")
