"""Members: which role a user has, in the organisation or in one project."""

from typing import Annotated

from fastapi import Path, Query
from pydantic import Field

from helixflow.console.endpoint import ADMIN, endpoint
from helixflow.console.fields import Identifier, Moment, OptionalId, OptionalProject, RoleName
from helixflow.console.models import Given, Page, Shown
from helixflow.rpc.generated.auth_v1 import admin_pb2

_ID = ["user_6b86b273ff34fce19d6b804e"]
UserId = Annotated[Identifier, Path(description="The user.", examples=_ID)]
ProjectId = Annotated[OptionalProject, Query(description="In which project; none: in the organisation itself.")]


class Member(Shown):
    """A user with a role."""

    user_id: str = Field(description="The user.", examples=_ID)
    email: str = Field(description="Their e-mail.", examples=["ada@example.com"])
    name: str = Field(description="Their name.", examples=["Ada Lovelace"])
    project_id: OptionalId = Field(description="Where the role holds; null: in the organisation.")
    role: str = Field(description="The role.", examples=["developer"])
    created_at: Moment = Field(description="Since when.")
    version: int = Field(description="Counts its changes; the `ETag`.", examples=[1])


class MemberPage(Page[Member]):
    """One page of members."""


class MemberRole(Given):
    """The role to give."""

    role: RoleName = Field(description="Its name; not more than the caller may do there.")


@endpoint("GET", "/members", ADMIN["ListMembers"], MemberPage)
def list_members(project_id: ProjectId = None) -> admin_pb2.ListMembersRequest:
    """The members of the organisation itself, or of one project."""
    return admin_pb2.ListMembersRequest(project_id=project_id or "")


@endpoint("PUT", "/members/{user_id}", ADMIN["SetMember"], Member)
def set_member(user_id: UserId, body: MemberRole, project_id: ProjectId = None) -> admin_pb2.SetMemberRequest:
    """Gives a role, or changes it."""
    return admin_pb2.SetMemberRequest(user_id=user_id, project_id=project_id or "", role=body.role)


@endpoint("DELETE", "/members/{user_id}", ADMIN["RemoveMember"])
def remove_member(user_id: UserId, project_id: ProjectId = None) -> admin_pb2.RemoveMemberRequest:
    """Takes the role away."""
    return admin_pb2.RemoveMemberRequest(user_id=user_id, project_id=project_id or "")


ENDPOINTS = (list_members, set_member, remove_member)
