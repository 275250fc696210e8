"""Service accounts: identities of programs."""

from typing import Annotated

from fastapi import Path, Query
from pydantic import Field

from helixflow.console.endpoint import ADMIN, endpoint
from helixflow.console.fields import Identifier, Moment, Name, OptionalId, OptionalProject, RoleName
from helixflow.console.models import Changes, Given, Page, Shown, absent
from helixflow.rpc.generated.auth_v1 import admin_pb2

_ID = ["sa_ef2d127de37b942baad06145"]
Id = Annotated[Identifier, Path(description="The service account.", examples=_ID)]


class ServiceAccount(Shown):
    """An identity for programs: keys act for it."""

    id: str = Field(description="Its id.", examples=_ID)
    name: str = Field(description="Its name.", examples=["nightly-report"])
    project_id: OptionalId = Field(description="Where its role holds; null: in the organisation.")
    role: str = Field(description="Its role.", examples=["developer"])
    suspended: bool = Field(description="Whether its keys are stopped.", examples=[False])
    created_at: Moment = Field(description="When it was made.")
    updated_at: Moment = Field(description="When it was last changed.")
    version: int = Field(description="Counts its changes; the `ETag`.", examples=[1])


class ServiceAccountPage(Page[ServiceAccount]):
    """One page of service accounts."""


class NewServiceAccount(Given):
    """A service account to be made."""

    name: Name = Field(description="Its name.", examples=["nightly-report"])
    project_id: OptionalProject = Field(None, description="Where its role holds; null: in the organisation.")
    role: RoleName = Field(description="Its role; not more than the caller may do there.")


class ServiceAccountChanges(Changes):
    """What changes; the rest stays."""

    name: Name = absent("Its name.")
    role: RoleName = absent("Its role; not more than the caller may do there.")
    suspended: Annotated[bool, Field(examples=[True])] = absent("Whether its keys are stopped.")


@endpoint("GET", "/service-accounts", ADMIN["ListServiceAccounts"], ServiceAccountPage)
def list_service_accounts(
    project_id: Annotated[
        OptionalProject, Query(description="Only those of this project; none: all that the caller may read.")
    ] = None,
) -> admin_pb2.ListInProjectRequest:
    """Service accounts, newest first."""
    return admin_pb2.ListInProjectRequest(project_id=project_id or "")


@endpoint(
    "POST",
    "/service-accounts",
    ADMIN["CreateServiceAccount"],
    ServiceAccount,
    location="/service-accounts/{0.id}",
)
def create_service_account(body: NewServiceAccount) -> admin_pb2.CreateServiceAccountRequest:
    """Makes a service account."""
    return admin_pb2.CreateServiceAccountRequest(**body.given())


@endpoint("GET", "/service-accounts/{id}", ADMIN["GetServiceAccount"], ServiceAccount)
def get_service_account(id: Id) -> admin_pb2.GetRequest:
    """One service account."""
    return admin_pb2.GetRequest(id=id)


@endpoint("PATCH", "/service-accounts/{id}", ADMIN["UpdateServiceAccount"], ServiceAccount)
def update_service_account(id: Id, body: ServiceAccountChanges) -> admin_pb2.UpdateServiceAccountRequest:
    """Changes a service account."""
    return admin_pb2.UpdateServiceAccountRequest(id=id, **body.present())


@endpoint("DELETE", "/service-accounts/{id}", ADMIN["DeleteServiceAccount"])
def delete_service_account(id: Id) -> admin_pb2.DeleteRequest:
    """Deletes a service account and revokes its keys."""
    return admin_pb2.DeleteRequest(id=id)


ENDPOINTS = (
    list_service_accounts,
    create_service_account,
    get_service_account,
    update_service_account,
    delete_service_account,
)
