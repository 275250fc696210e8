"""The installation's keys for access tokens."""

from pydantic import Field

from helixflow.console.endpoint import ADMIN, endpoint
from helixflow.console.fields import OptionalMoment
from helixflow.console.models import Shown
from helixflow.rpc.generated.auth_v1 import admin_pb2


class SigningKey(Shown):
    """The key that access tokens are signed with from now on."""

    kid: str = Field(description="Its id in the JWK set.", examples=["2026-11-23-7f3a"])
    others_expire_at: OptionalMoment = Field(description="When the keys before it stop being accepted.")


@endpoint("POST", "/signing-keys/rotate", ADMIN["RotateSigningKey"], SigningKey)
def rotate_signing_key() -> admin_pb2.RotateSigningKeyRequest:
    """Makes a new signing key; tokens of the old one stay valid until they expire."""
    return admin_pb2.RotateSigningKeyRequest()


ENDPOINTS = (rotate_signing_key,)
