"""Organisations."""

from typing import Annotated

from fastapi import Path
from pydantic import AfterValidator, Field, WithJsonSchema

from helixflow.console.endpoint import ADMIN, endpoint
from helixflow.console.fields import Email, Identifier, Moment, Name, Region, Weight
from helixflow.console.models import Changes, Given, Page, Shown, absent
from helixflow.console.resources.invitations import CreatedInvitation, Invitation
from helixflow.rpc.generated.auth_v1 import admin_pb2

_ID = ["org_5d41402abc4b2a76b9719d91"]


def _check_retention(days: int) -> int:
    if days != 0 and not 30 <= days <= 3650:
        raise ValueError("must be 0, or 30 to 3650")
    return days


Retention = Annotated[
    int,
    AfterValidator(_check_retention),
    WithJsonSchema({"type": "integer", "anyOf": [{"const": 0}, {"minimum": 30, "maximum": 3650}], "examples": [365]}),
]
Id = Annotated[Identifier, Path(description="The organisation.", examples=_ID)]


class Organisation(Shown):
    """An organisation: what belongs to it is not seen from others."""

    id: str = Field(description="Its id.", examples=_ID)
    name: str = Field(description="Its name.", examples=["Example Ltd"])
    audit_retention_days: int = Field(description="Days that audit records are kept; 0: for ever.", examples=[365])
    residency: str = Field(description="The only region that may serve its calls; empty: any.", examples=["eu"])
    share_weight: int = Field(description="Its share among organisations when requests wait.", examples=[100])
    max_priority: int = Field(description="The highest priority that its keys can have.", examples=[0])
    created_at: Moment = Field(description="When it was made.")
    updated_at: Moment = Field(description="When it was last changed.")
    version: int = Field(description="Counts its changes; the `ETag`.", examples=[1])


class OrganisationPage(Page[Organisation]):
    """One page of organisations."""


class NewOrganisation(Given):
    """An organisation to be made, and who owns it."""

    name: Name = Field(description="Its name.", examples=["Example Ltd"])
    owner_email: Email = Field(description="The first owner, who gets an invitation.")


class NewOwner(Given):
    """Who is to own an organisation too."""

    owner_email: Email = Field(description="Who gets an invitation; not yet a member there.")


class OrganisationChanges(Changes):
    """What changes; the rest stays."""

    name: Name = absent("Its name.")
    audit_retention_days: Retention = absent("Days that audit records are kept: 30 to 3650, or 0 for ever.")
    residency: Region = absent("The only region that may serve its calls; empty: any.")


class Shares(Changes):
    """What an organisation gets of engines that are full; the rest stays."""

    share_weight: Weight = absent("Its share among organisations when requests wait.")
    max_priority: Annotated[int, Field(ge=0, le=10, examples=[0])] = absent("The highest priority of its keys.")


class CreatedOrganisation(Shown):
    """A new organisation and the invitation of its owner."""

    organisation: Organisation
    invitation: Invitation
    invitation_token: str = Field(description="What the owner redeems; shown once.", examples=["hft_0123456789"])


@endpoint("GET", "/organisations", ADMIN["ListOrganisations"], OrganisationPage)
def list_organisations() -> admin_pb2.ListRequest:
    """All organisations of the installation, by name."""
    return admin_pb2.ListRequest()


@endpoint(
    "POST",
    "/organisations",
    ADMIN["CreateOrganisation"],
    CreatedOrganisation,
    location="/organisations/{0.organisation.id}",
)
def create_organisation(body: NewOrganisation) -> admin_pb2.CreateOrganisationRequest:
    """Makes an organisation and invites its first owner."""
    return admin_pb2.CreateOrganisationRequest(**body.given())


@endpoint(
    "POST",
    "/organisations/{id}/owners",
    ADMIN["InviteOwner"],
    CreatedInvitation,
    location="/invitations/{0.invitation.id}",
)
def invite_owner(id: Id, body: NewOwner) -> admin_pb2.InviteOwnerRequest:
    """Invites one more owner, for an organisation whose owners cannot sign in any more."""
    return admin_pb2.InviteOwnerRequest(organisation_id=id, **body.given())


@endpoint("GET", "/organisations/{id}", ADMIN["GetOrganisation"], Organisation)
def get_organisation(id: Id) -> admin_pb2.GetRequest:
    """One organisation."""
    return admin_pb2.GetRequest(id=id)


@endpoint("PATCH", "/organisations/{id}", ADMIN["UpdateOrganisation"], Organisation)
def update_organisation(id: Id, body: OrganisationChanges) -> admin_pb2.UpdateOrganisationRequest:
    """Changes an organisation."""
    return admin_pb2.UpdateOrganisationRequest(id=id, **body.present())


@endpoint("PATCH", "/organisations/{id}/shares", ADMIN["SetShares"], Organisation)
def set_shares(id: Id, body: Shares) -> admin_pb2.SetSharesRequest:
    """Says what an organisation gets of engines that are full, for operators; effective within a second."""
    return admin_pb2.SetSharesRequest(organisation_id=id, **body.present())


@endpoint("DELETE", "/organisations/{id}", ADMIN["DeleteOrganisation"])
def delete_organisation(id: Id) -> admin_pb2.DeleteRequest:
    """Ends everything in it: keys, sessions, projects. The audit log stays. The first one cannot be deleted."""
    return admin_pb2.DeleteRequest(id=id)


ENDPOINTS = (
    list_organisations,
    create_organisation,
    invite_owner,
    get_organisation,
    update_organisation,
    set_shares,
    delete_organisation,
)
