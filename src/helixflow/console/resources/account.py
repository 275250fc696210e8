"""What callers do with their own account."""

from typing import Annotated

from fastapi import Path
from pydantic import Field

from helixflow.console.endpoint import PASSWORD_TIMEOUT_S, SESSIONS, endpoint
from helixflow.console.fields import Code, Identifier, Moment, OptionalId, OptionalText, Password, Texts
from helixflow.console.models import Given, Page, Shown
from helixflow.rpc.generated.auth_v1 import sessions_pb2


class OrganisationMembership(Shown):
    """An organisation that the account is a member of."""

    organisation_id: str = Field(description="Its id.", examples=["org_5d41402abc4b2a76"])
    name: str = Field(description="Its name.", examples=["Example Ltd"])


class ProjectPermissions(Shown):
    """What may be done in one project beyond what may be done everywhere."""

    project_id: str = Field(description="The project.", examples=["proj_37913d99a1ae28e3195d7a1f"])
    permissions: Texts = Field(description="Permissions, sorted.", examples=[["keys:read"]])


class Self(Shown):
    """Who calls, and what that caller may do."""

    kind: str = Field(description="`account` or `key`.", examples=["account"])
    id: str = Field(description="Id of the account or key.", examples=["user_6b86b273ff34fce1"])
    name: str = Field(description="Its name.", examples=["Ada Lovelace"])
    email: OptionalText = Field(description="Of accounts only.", examples=["ada@example.com"])
    mfa_enabled: bool = Field(description="Whether signing in wants a second factor.", examples=[True])
    organisation_id: str = Field(description="Where the credential acts.", examples=["org_5d41402abc4b2a76"])
    project_id: OptionalId = Field(description="The project of the credential.")
    roles: Texts = Field(description="Names of the roles in the organisation.", examples=[["developer"]])
    permissions: Texts = Field(description="What may be done in all of it, sorted.", examples=[["keys:read"]])
    operator: bool = Field(description="Whether the installation may be administered.", examples=[False])
    organisations: Annotated[list[OrganisationMembership], Field(description="All that the account is a member of.")]
    projects: Annotated[list[ProjectPermissions], Field(description="What may be done beyond that in projects.")]


class PasswordChange(Given):
    """The caller's password and the one that replaces it."""

    current_password: Password = Field(description="The present password.")
    new_password: Password = Field(description="The new one.", examples=["four other random words"])


class PasswordProof(Given):
    """The caller's password, again."""

    current_password: Password = Field(description="The present password.")


class Enrolment(Shown):
    """A secret for an authenticator app. It counts once it is confirmed."""

    secret: str = Field(description="Base32.", examples=["JBSWY3DPEHPK3PXP"])
    uri: str = Field(description="For a QR code.", examples=["otpauth://totp/HelixFlow:ada?secret=JBSWY3DPEHPK3PXP"])


class Confirmation(Given):
    """Shows that the authenticator app has the secret."""

    code: Code = Field(description="A code of the app.")


class SecondFactorProof(Given):
    """What it takes to turn the second factor off, or to have new recovery codes."""

    current_password: Password = Field(description="The present password.")
    code: Code = Field(description="A code of the app, or a recovery code.")


class RecoveryCodes(Shown):
    """Codes for when the app is lost. They are shown once."""

    codes: Texts = Field(description="Each works once.", examples=[["k7f2-9xq1-mm3d"]])


class Session(Shown):
    """One signing-in."""

    id: str = Field(description="Its id.", examples=["ses_0cc175b9c0f1b6a8"])
    account_id: str = Field(description="Who signed in.", examples=["user_6b86b273ff34fce1"])
    organisation_id: str = Field(description="Where.", examples=["org_5d41402abc4b2a76"])
    project_id: OptionalId = Field(description="The project of its tokens.")
    method: str = Field(description="`password`, `password+totp` or `password+recovery_code`.", examples=["password"])
    address: OptionalText = Field(description="The client's address.", examples=["203.0.113.7"])
    user_agent: OptionalText = Field(description="The client's software, in its own words.", examples=["Firefox"])
    created_at: Moment = Field(description="When it began.")
    refreshed_at: Moment = Field(description="When its tokens were last renewed.")
    expires_at: Moment = Field(description="When it ends unless it is renewed.")
    current: bool = Field(description="Whether this very request belongs to it.", examples=[True])


class SessionPage(Page[Session]):
    """One page of sessions."""


@endpoint("GET", "/me", SESSIONS["GetSelf"], Self)
def get_self() -> sessions_pb2.GetSelfRequest:
    """Who the caller is and may do what."""
    return sessions_pb2.GetSelfRequest()


@endpoint("PUT", "/me/password", SESSIONS["ChangePassword"], timeout_s=PASSWORD_TIMEOUT_S)
def change_password(body: PasswordChange) -> sessions_pb2.ChangePasswordRequest:
    """Changes the caller's own password and ends their other sessions."""
    return sessions_pb2.ChangePasswordRequest(**body.given())


@endpoint("GET", "/me/sessions", SESSIONS["ListOwnSessions"], SessionPage)
def list_own_sessions() -> sessions_pb2.ListOwnSessionsRequest:
    """The caller's own sessions that have not ended, newest first, all on one page."""
    return sessions_pb2.ListOwnSessionsRequest()


@endpoint("DELETE", "/me/sessions/{id}", SESSIONS["EndOwnSession"])
def end_own_session(
    id: Annotated[Identifier, Path(description="The session.", examples=["ses_0cc175b9c0f1b6a8"])],
) -> sessions_pb2.EndOwnSessionRequest:
    """Ends one of the caller's own sessions."""
    return sessions_pb2.EndOwnSessionRequest(session_id=id)


@endpoint("POST", "/auth/mfa/enrol", SESSIONS["EnrolMfa"], Enrolment, timeout_s=PASSWORD_TIMEOUT_S)
def enrol_mfa(body: PasswordProof) -> sessions_pb2.EnrolMfaRequest:
    """Begins a second factor: gives a secret that counts only once it is confirmed."""
    return sessions_pb2.EnrolMfaRequest(**body.given())


@endpoint("POST", "/auth/mfa/confirm", SESSIONS["ConfirmMfa"], RecoveryCodes, timeout_s=PASSWORD_TIMEOUT_S)
def confirm_mfa(body: Confirmation) -> sessions_pb2.ConfirmMfaRequest:
    """Turns the second factor on; gives recovery codes, once."""
    return sessions_pb2.ConfirmMfaRequest(**body.given())


@endpoint("POST", "/auth/mfa/disable", SESSIONS["DisableMfa"], timeout_s=PASSWORD_TIMEOUT_S)
def disable_mfa(body: SecondFactorProof) -> sessions_pb2.DisableMfaRequest:
    """Turns the second factor off."""
    return sessions_pb2.DisableMfaRequest(**body.given())


@endpoint(
    "POST", "/auth/mfa/recovery-codes", SESSIONS["RenewRecoveryCodes"], RecoveryCodes, timeout_s=PASSWORD_TIMEOUT_S
)
def renew_recovery_codes(body: SecondFactorProof) -> sessions_pb2.RenewRecoveryCodesRequest:
    """New recovery codes; the old ones end."""
    return sessions_pb2.RenewRecoveryCodesRequest(**body.given())


ENDPOINTS = (
    get_self,
    change_password,
    list_own_sessions,
    end_own_session,
    enrol_mfa,
    confirm_mfa,
    disable_mfa,
    renew_recovery_codes,
)
