"""The installation's keys for access tokens."""

from pydantic import Field

from helixflow.console.endpoint import ADMIN, endpoint
from helixflow.console.fields import OptionalMoment
from helixflow.console.models import Given, Shown
from helixflow.rpc.generated.auth_v1 import admin_pb2


class SigningKeyRotation(Given):
    """How the keys before give way."""

    revoke_others: bool = Field(
        False,
        description="Ends them at once with all access tokens: for a key that may be known to others.",
        examples=[True],
    )


class SigningKey(Shown):
    """The key that access tokens are signed with from now on."""

    kid: str = Field(description="Its id in the JWK set.", examples=["2026-11-23-7f3a"])
    others_expire_at: OptionalMoment = Field(description="When the keys before it stop being accepted.")


@endpoint("POST", "/signing-keys/rotate", ADMIN["RotateSigningKey"], SigningKey)
def rotate_signing_key(body: SigningKeyRotation | None = None) -> admin_pb2.RotateSigningKeyRequest:
    """Makes a new signing key. Tokens of the others stay valid until they expire, unless `revoke_others` ends them:
    whoever has a session then refreshes.
    """
    return admin_pb2.RotateSigningKeyRequest(**body.given() if body is not None else {})


ENDPOINTS = (rotate_signing_key,)
