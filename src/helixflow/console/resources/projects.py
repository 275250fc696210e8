"""Projects."""

from typing import Annotated

from fastapi import Path
from pydantic import Field

from helixflow.console.endpoint import ADMIN, endpoint
from helixflow.console.fields import Identifier, Moment, Name
from helixflow.console.models import Changes, Given, Page, Shown, absent
from helixflow.rpc.generated.auth_v1 import admin_pb2

_ID = ["proj_37913d99a1ae28e3195d7a1f"]
Id = Annotated[Identifier, Path(description="The project.", examples=_ID)]


class Project(Shown):
    """A project: keys and members belong to it."""

    id: str = Field(description="Its id.", examples=_ID)
    organisation_id: str = Field(description="Its organisation.", examples=["org_5d41402abc4b2a76b9719d91"])
    name: str = Field(description="Its name.", examples=["Research"])
    created_at: Moment = Field(description="When it was made.")
    updated_at: Moment = Field(description="When it was last changed.")
    version: int = Field(description="Counts its changes; the `ETag`.", examples=[1])


class ProjectPage(Page[Project]):
    """One page of projects."""


class NewProject(Given):
    """A project to be made."""

    name: Name = Field(description="Its name.")


class ProjectChanges(Changes):
    """What changes; the rest stays."""

    name: Name = absent("Its name.")


@endpoint("GET", "/projects", ADMIN["ListProjects"], ProjectPage)
def list_projects() -> admin_pb2.ListRequest:
    """The projects that the caller may read, newest first."""
    return admin_pb2.ListRequest()


@endpoint("POST", "/projects", ADMIN["CreateProject"], Project, location="/projects/{0.id}")
def create_project(body: NewProject) -> admin_pb2.CreateProjectRequest:
    """Makes a project."""
    return admin_pb2.CreateProjectRequest(**body.given())


@endpoint("GET", "/projects/{id}", ADMIN["GetProject"], Project)
def get_project(id: Id) -> admin_pb2.GetRequest:
    """One project."""
    return admin_pb2.GetRequest(id=id)


@endpoint("PATCH", "/projects/{id}", ADMIN["UpdateProject"], Project)
def update_project(id: Id, body: ProjectChanges) -> admin_pb2.UpdateProjectRequest:
    """Changes a project."""
    return admin_pb2.UpdateProjectRequest(id=id, **body.present())


@endpoint("DELETE", "/projects/{id}", ADMIN["DeleteProject"])
def delete_project(id: Id) -> admin_pb2.DeleteRequest:
    """Deletes a project, revokes its keys and removes its members."""
    return admin_pb2.DeleteRequest(id=id)


ENDPOINTS = (list_projects, create_project, get_project, update_project, delete_project)
