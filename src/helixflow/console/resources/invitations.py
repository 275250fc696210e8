"""Invitations: what makes members of people, with or without an account."""

from typing import Annotated

from fastapi import Path
from pydantic import Field

from helixflow.console.endpoint import ADMIN, endpoint
from helixflow.console.fields import Email, Identifier, Moment, OptionalId, OptionalProject, RoleName
from helixflow.console.models import Given, Page, Shown
from helixflow.rpc.generated.auth_v1 import admin_pb2

_ID = ["inv_d4735e3a265e16eee03f5971"]


class Invitation(Shown):
    """An invitation that has not been redeemed."""

    id: str = Field(description="Its id.", examples=_ID)
    email: str = Field(description="Who is invited.", examples=["ada@example.com"])
    role: str = Field(description="The role that it gives.", examples=["developer"])
    project_id: OptionalId = Field(description="Where it gives the role; null: in the organisation.")
    created_at: Moment = Field(description="When it was made.")
    expires_at: Moment = Field(description="Until when it works.")
    invited_by: str = Field(description="Id of who made it.", examples=["user_6b86b273ff34fce19d6b804e"])


class InvitationPage(Page[Invitation]):
    """One page of invitations."""


class NewInvitation(Given):
    """An invitation to be made."""

    email: Email = Field(description="Who is invited.")
    role: RoleName = Field(description="The role that it gives; not more than the caller may do.")
    project_id: OptionalProject = Field(None, description="Where it gives the role; null: in the organisation.")


class CreatedInvitation(Shown):
    """A new invitation."""

    invitation: Invitation
    token: str = Field(description="What the invited person redeems; shown once.", examples=["hft_0123456789"])


@endpoint("GET", "/invitations", ADMIN["ListInvitations"], InvitationPage)
def list_invitations() -> admin_pb2.ListRequest:
    """The invitations that have not been redeemed, newest first."""
    return admin_pb2.ListRequest()


@endpoint("POST", "/invitations", ADMIN["InviteUser"], CreatedInvitation, location="/invitations/{0.invitation.id}")
def create_invitation(body: NewInvitation) -> admin_pb2.InviteUserRequest:
    """Invites somebody. Says nothing about whether the e-mail has an account elsewhere."""
    return admin_pb2.InviteUserRequest(**body.given())


@endpoint("DELETE", "/invitations/{id}", ADMIN["RevokeInvitation"], versioned=False)
def revoke_invitation(
    id: Annotated[Identifier, Path(description="The invitation.", examples=_ID)],
) -> admin_pb2.DeleteRequest:
    """Takes an invitation back."""
    return admin_pb2.DeleteRequest(id=id)


ENDPOINTS = (list_invitations, create_invitation, revoke_invitation)
