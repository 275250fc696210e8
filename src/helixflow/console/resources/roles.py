"""Roles: the built-in ones, and the organisation's own."""

from typing import Annotated, Any

from fastapi import Path
from pydantic import Field

from helixflow.console.endpoint import ADMIN, endpoint
from helixflow.console.fields import (
    MAX_LIST,
    Description,
    Identifier,
    OptionalMoment,
    PermissionName,
    RoleName,
    Texts,
)
from helixflow.console.models import Changes, Given, Page, Shown, absent
from helixflow.rpc.generated.auth_v1 import admin_pb2

_ID = ["role_4e07408562bedb8b60ce05c1"]
Id = Annotated[Identifier, Path(description="The role; of a built-in one its name.", examples=_ID)]
Permissions = Annotated[list[PermissionName], Field(max_length=MAX_LIST, examples=[["keys:read", "projects:read"]])]


class Role(Shown):
    """A named set of permissions."""

    id: str = Field(description="Its id; of a built-in role its name.", examples=_ID)
    name: str = Field(description="Its name.", examples=["key-keeper"])
    description: str = Field(description="What it is for.", examples=["Looks after API keys."])
    permissions: Texts = Field(description="What it permits, sorted.", examples=[["keys:read", "projects:read"]])
    built_in: bool = Field(description="Built-in roles cannot be changed.", examples=[False])
    created_at: OptionalMoment = Field(description="When it was made; null for built-in ones.")
    updated_at: OptionalMoment = Field(description="When it was last changed; null for built-in ones.")
    version: int = Field(description="Counts its changes; the `ETag`.", examples=[1])


class RolePage(Page[Role]):
    """One page of roles."""


class NewRole(Given):
    """A role to be made."""

    name: RoleName = Field(description="Its name; not that of another role.", examples=["key-keeper"])
    description: Description = Field("", description="What it is for.")
    permissions: Permissions = Field(description="What it permits.")


class RoleChanges(Changes):
    """What changes; the rest stays."""

    description: Description = absent("What it is for.")
    permissions: Permissions = absent("What it permits, all of it.")


@endpoint("GET", "/roles", ADMIN["ListRoles"], RolePage)
def list_roles() -> admin_pb2.ListRequest:
    """All roles: built-in ones first, then by name."""
    return admin_pb2.ListRequest()


@endpoint("POST", "/roles", ADMIN["CreateRole"], Role, location="/roles/{0.id}")
def create_role(body: NewRole) -> admin_pb2.CreateRoleRequest:
    """Makes a role of the organisation's own."""
    return admin_pb2.CreateRoleRequest(**body.given())


@endpoint("GET", "/roles/{id}", ADMIN["GetRole"], Role)
def get_role(id: Id) -> admin_pb2.GetRequest:
    """One role."""
    return admin_pb2.GetRequest(id=id)


@endpoint("PATCH", "/roles/{id}", ADMIN["UpdateRole"], Role)
def update_role(id: Id, body: RoleChanges) -> admin_pb2.UpdateRoleRequest:
    """Changes a role of the organisation's own, for all who have it."""
    present: dict[str, Any] = body.present()
    if "permissions" in present:
        present["permissions"] = admin_pb2.StringList(values=present["permissions"])
    return admin_pb2.UpdateRoleRequest(id=id, **present)


@endpoint("DELETE", "/roles/{id}", ADMIN["DeleteRole"])
def delete_role(id: Id) -> admin_pb2.DeleteRequest:
    """Deletes a role of the organisation's own. 409 while somebody has it."""
    return admin_pb2.DeleteRequest(id=id)


ENDPOINTS = (list_roles, create_role, get_role, update_role, delete_role)
