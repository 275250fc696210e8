"""API keys."""

from typing import Annotated, Any

from fastapi import Path, Query
from pydantic import Field

from helixflow.console.endpoint import ADMIN, endpoint
from helixflow.console.fields import (
    MAX_LIST,
    GivenMoment,
    Identifier,
    ModelName,
    Moment,
    Name,
    Network,
    OptionalId,
    OptionalMoment,
    OptionalProject,
    OptionalText,
    ScopeName,
    Texts,
    Weight,
)
from helixflow.console.models import Changes, Given, Page, Shown, absent
from helixflow.rpc.generated.auth_v1 import admin_pb2

MAX_OVERLAP_S = 30 * 86_400
_ID = ["key_37913d99a1ae28e3195d7a1f"]
Id = Annotated[Identifier, Path(description="The key.", examples=_ID)]
Expiry = Annotated[GivenMoment | None, Field(examples=["2027-01-31T00:00:00Z"])]
Scopes = Annotated[list[ScopeName], Field(max_length=MAX_LIST, examples=[["models:read", "models:use"]])]
Models = Annotated[list[ModelName], Field(max_length=MAX_LIST, examples=[["smollm2-135m-instruct"]])]
Networks = Annotated[list[Network], Field(max_length=MAX_LIST, examples=[["203.0.113.0/24"]])]

Priority = Annotated[int, Field(ge=-10, le=10, examples=[0])]


class Key(Shown):
    """An API key, without its secret."""

    id: str = Field(description="Its id.", examples=_ID)
    name: str = Field(description="What it is for.", examples=["laptop"])
    hint: str = Field(description="Its first and last characters, to recognise it.", examples=["hfk_Hysh…x3Qa"])
    project_id: str = Field(description="Its project.", examples=["proj_37913d99a1ae28e3195d7a1f"])
    owner_id: OptionalId = Field(
        description="The account or service account that it acts for; null for a key of the project itself.",
        examples=["sa_ef2d127de37b942baad06145"],
    )
    scopes: Texts = Field(
        description="What it may be used for, out of what its owner may do; sorted.",
        examples=[["models:read", "models:use"]],
    )
    models: Texts = Field(description="Models that it may use; empty: all.", examples=[["smollm2-135m-instruct"]])
    networks: Texts = Field(description="Networks that it may be used from; empty: all.", examples=[["203.0.113.0/24"]])
    created_at: Moment = Field(description="When it was made.")
    updated_at: Moment = Field(description="When it was last changed.")
    expires_at: OptionalMoment = Field(description="Until when it works; null: for good.")
    revoked_at: OptionalMoment = Field(description="Since when it does not work; null while it is valid.")
    rotated_from: OptionalText = Field(
        description="The key that it replaced.", examples=["key_7902699be42c8a8e46fbbb45"]
    )
    bootstrap: bool = Field(description="Whether it is the first key of the installation.", examples=[False])
    priority: int = Field(description="Its waiting requests go before those of lower ones.", examples=[0])
    weight: int = Field(description="Its share among the organisation's keys when requests wait.", examples=[100])
    created_by: str = Field(description="Id of who made it.", examples=["user_6b86b273ff34fce19d6b804e"])
    version: int = Field(description="Counts its changes; the `ETag`.", examples=[1])


class KeyPage(Page[Key]):
    """One page of keys."""


class NewKey(Given):
    """A key to be made."""

    name: Name = Field(description="What it is for.", examples=["laptop"])
    project_id: OptionalProject = Field(None, description="Its project; null: that of the caller's credential.")
    owner_id: Identifier | None = Field(
        None,
        description="Whom it acts for: the caller's own id or a service account; null: a key of the project itself.",
        examples=["sa_ef2d127de37b942baad06145"],
    )
    scopes: Scopes = Field(
        [], description="What it may be used for, not more than caller and owner may do; empty: to use models."
    )
    models: Models = Field([], description="Models that it may use; empty: all.")
    networks: Networks = Field([], description="Networks that it may be used from; empty: all.")
    expires_at: Expiry = Field(None, description="Until when it works; null: for good.")
    priority: Priority = Field(0, description="Its waiting requests go before those of lower ones.")
    weight: Weight = Field(100, description="Its share among the organisation's keys when requests wait.")


class KeyChanges(Changes):
    """What changes; the rest stays."""

    name: Name = absent("What it is for.")
    scopes: Scopes = absent("What it may be used for, all of it.")
    models: Models = absent("Models that it may use; empty: all.")
    networks: Networks = absent("Networks that it may be used from; empty: all.")
    expires_at: Expiry = absent("Until when it works; null: for good.")
    priority: Priority = absent("Its waiting requests go before those of lower ones.")
    weight: Weight = absent("Its share among the organisation's keys when requests wait.")


class Rotation(Given):
    """How a key gives way to another one."""

    overlap_s: Annotated[int, Field(ge=0, le=MAX_OVERLAP_S, examples=[86_400])] = Field(
        86_400, description="How long both keys work, seconds: 0 to 30 days."
    )


class CreatedKey(Shown):
    """A new key with its secret."""

    key: Key
    secret: str = Field(description="The key itself; shown once.", examples=["hfk_0123456789"])


class RotatedKey(CreatedKey):
    """A new key with its secret, and the one that it replaces."""

    replaced: Key


@endpoint("GET", "/keys", ADMIN["ListKeys"], KeyPage)
def list_keys(
    project_id: Annotated[
        OptionalProject, Query(description="Only those of this project; none: all that the caller may read.")
    ] = None,
) -> admin_pb2.ListInProjectRequest:
    """Keys, newest first, revoked and expired ones too."""
    return admin_pb2.ListInProjectRequest(project_id=project_id or "")


@endpoint("POST", "/keys", ADMIN["CreateKey"], CreatedKey, location="/keys/{0.key.id}")
def create_key(body: NewKey) -> admin_pb2.CreateKeyRequest:
    """Makes a key. Its secret is in the answer and nowhere else."""
    return admin_pb2.CreateKeyRequest(**body.given())


@endpoint("GET", "/keys/{id}", ADMIN["GetKey"], Key)
def get_key(id: Id) -> admin_pb2.GetRequest:
    """One key."""
    return admin_pb2.GetRequest(id=id)


@endpoint("PATCH", "/keys/{id}", ADMIN["UpdateKey"], Key)
def update_key(id: Id, body: KeyChanges) -> admin_pb2.UpdateKeyRequest:
    """Changes a key; effective everywhere within a second."""
    present: dict[str, Any] = body.present()
    for name in ("scopes", "models", "networks"):
        if name in present:
            present[name] = admin_pb2.StringList(values=present[name])
    if "expires_at" in present:
        present["expires_at"] = present["expires_at"] or 0
    return admin_pb2.UpdateKeyRequest(id=id, **present)


@endpoint("POST", "/keys/{id}/rotate", ADMIN["RotateKey"], RotatedKey, location="/keys/{0.key.id}")
def rotate_key(id: Id, body: Rotation) -> admin_pb2.RotateKeyRequest:
    """Makes a new key with the same restrictions; the old one goes on for a while."""
    return admin_pb2.RotateKeyRequest(id=id, **body.given())


@endpoint("POST", "/keys/{id}/revoke", ADMIN["RevokeKey"], Key)
def revoke_key(id: Id) -> admin_pb2.ChangeRequest:
    """Revokes a key for good; a second time changes nothing."""
    return admin_pb2.ChangeRequest(id=id)


ENDPOINTS = (list_keys, create_key, get_key, update_key, rotate_key, revoke_key)
