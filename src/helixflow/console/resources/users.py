"""Users: accounts that belong to the organisation, or are members of it."""

from typing import Annotated

from fastapi import Path, Query
from pydantic import Field

from helixflow.console.endpoint import ADMIN, PASSWORD_TIMEOUT_S, endpoint
from helixflow.console.fields import (
    Email,
    Identifier,
    Moment,
    Name,
    OptionalMoment,
    OptionalText,
    Password,
    RoleName,
)
from helixflow.console.models import Changes, Given, Page, Shown, absent
from helixflow.console.resources.account import SessionPage
from helixflow.rpc.generated.auth_v1 import admin_pb2

_ID = ["user_6b86b273ff34fce19d6b804e"]
Id = Annotated[Identifier, Path(description="The user.", examples=_ID)]


class User(Shown):
    """An account, as this organisation sees it."""

    id: str = Field(description="Its id.", examples=_ID)
    email: str = Field(description="Its e-mail.", examples=["ada@example.com"])
    name: str = Field(description="The person's name.", examples=["Ada Lovelace"])
    status: str = Field(description="`invited` (no password yet), `active` or `suspended`.", examples=["active"])
    home_organisation_id: str = Field(
        description="The organisation that the account belongs to: only there can it be changed.",
        examples=["org_5d41402abc4b2a76b9719d91"],
    )
    mfa_enabled: bool = Field(description="Whether signing in wants a second factor.", examples=[True])
    role: OptionalText = Field(
        description="Its role in the organisation; null for members of single projects.", examples=["developer"]
    )
    operator: bool = Field(description="Whether it may administer the installation.", examples=[False])
    created_at: Moment = Field(description="When it was made.")
    updated_at: Moment = Field(description="When it was last changed.")
    last_login_at: OptionalMoment = Field(description="When it last signed in; null: never.")
    version: int = Field(description="Counts its changes; the `ETag`.", examples=[1])


class UserPage(Page[User]):
    """One page of users."""


class NewUser(Given):
    """An account to be made."""

    email: Email = Field(description="Its e-mail, to sign in with.")
    name: Name = Field(description="The person's name.", examples=["Ada Lovelace"])
    password: Password | None = Field(
        None, description="Its password; null: the answer has a token that sets it.", examples=["four random words"]
    )
    role: RoleName | None = Field(None, description="Its role in the organisation; null: none.", examples=["developer"])
    operator: bool = Field(
        False, description="Whether it may administer the installation. Only operators can make operators."
    )


class UserChanges(Changes):
    """What changes; the rest stays."""

    name: Name = absent("The person's name.")
    email: Email = absent("The e-mail to sign in with.")


class CreatedUser(Shown):
    """A new account."""

    user: User
    token: OptionalText = Field(
        description="Sets the password; shown once. Null when a password was given.", examples=["hft_0123456789"]
    )
    token_expires_at: OptionalMoment = Field(description="Until when the token works.")


class ResetUser(Shown):
    """An account whose password and second factor were taken away."""

    user: User
    token: str = Field(description="Sets a new password; shown once.", examples=["hft_0123456789"])
    token_expires_at: Moment = Field(description="Until when the token works.")


class EndedSessions(Shown):
    """How many sessions were ended."""

    ended: int = Field(description="Their number.", examples=[2])


@endpoint("GET", "/users", ADMIN["ListUsers"], UserPage)
def list_users(
    email: Annotated[Email | None, Query(description="Only the user with exactly this e-mail.")] = None,
) -> admin_pb2.ListUsersRequest:
    """The users of the organisation, newest first."""
    return admin_pb2.ListUsersRequest(email=email or "")


@endpoint(
    "POST", "/users", ADMIN["CreateUser"], CreatedUser, location="/users/{0.user.id}", timeout_s=PASSWORD_TIMEOUT_S
)
def create_user(body: NewUser) -> admin_pb2.CreateUserRequest:
    """Makes an account, with a password or with a token that sets it."""
    return admin_pb2.CreateUserRequest(**body.given())


@endpoint("GET", "/users/{id}", ADMIN["GetUser"], User)
def get_user(id: Id) -> admin_pb2.GetRequest:
    """One user."""
    return admin_pb2.GetRequest(id=id)


@endpoint("PATCH", "/users/{id}", ADMIN["UpdateUser"], User)
def update_user(id: Id, body: UserChanges) -> admin_pb2.UpdateUserRequest:
    """Changes an account that belongs to the organisation."""
    return admin_pb2.UpdateUserRequest(id=id, **body.present())


@endpoint("DELETE", "/users/{id}", ADMIN["DeleteUser"])
def delete_user(id: Id) -> admin_pb2.DeleteRequest:
    """Ends everything of theirs and forgets e-mail, name, password and second factor. The id stays in the audit log."""
    return admin_pb2.DeleteRequest(id=id)


@endpoint("POST", "/users/{id}/suspend", ADMIN["SuspendUser"], User)
def suspend_user(id: Id) -> admin_pb2.ChangeRequest:
    """Ends the user's sessions and stops their keys, until reinstated."""
    return admin_pb2.ChangeRequest(id=id)


@endpoint("POST", "/users/{id}/reinstate", ADMIN["ReinstateUser"], User)
def reinstate_user(id: Id) -> admin_pb2.ChangeRequest:
    """Lets a suspended user in again."""
    return admin_pb2.ChangeRequest(id=id)


@endpoint("POST", "/users/{id}/reset", ADMIN["ResetUser"], ResetUser)
def reset_user(id: Id) -> admin_pb2.ChangeRequest:
    """Ends the user's sessions, takes away password and second factor, and gives a token that sets a new password."""
    return admin_pb2.ChangeRequest(id=id)


@endpoint("GET", "/users/{id}/sessions", ADMIN["ListUserSessions"], SessionPage)
def list_user_sessions(id: Id) -> admin_pb2.ListUserSessionsRequest:
    """A user's sessions in this organisation that have not ended, newest first."""
    return admin_pb2.ListUserSessionsRequest(user_id=id)


@endpoint("DELETE", "/users/{id}/sessions", ADMIN["EndUserSessions"], EndedSessions)
def end_user_sessions(id: Id) -> admin_pb2.EndUserSessionsRequest:
    """Ends all sessions of a user in this organisation."""
    return admin_pb2.EndUserSessionsRequest(user_id=id)


ENDPOINTS = (
    list_users,
    create_user,
    get_user,
    update_user,
    delete_user,
    suspend_user,
    reinstate_user,
    reset_user,
    list_user_sessions,
    end_user_sessions,
)
