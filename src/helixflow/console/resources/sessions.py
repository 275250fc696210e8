"""Signing in and out."""

from typing import Final, Literal

from pydantic import Field

from helixflow.console.endpoint import PASSWORD_TIMEOUT_S, SESSIONS, endpoint
from helixflow.console.fields import AnyEmail, Code, Identifier, Name, OptionalProject, Password, Token
from helixflow.console.models import Given, Shown
from helixflow.rpc.generated.auth_v1 import sessions_pb2

# A wrong credential, an account that is suspended, an organisation or project that is not the account's.
_NOT_LET_IN: Final = (401, 403, 404)
_JWT = "eyJhbGciOiJSUzI1NiIsImtpZCI6IjEifQ.eyJpc3MiOiJoZWxpeGZsb3cifQ.c2lnbmF0dXJl"


class Credentials(Given):
    """An e-mail and its password."""

    email: AnyEmail = Field(description="E-mail of the account.")
    password: Password = Field(description="Its password.")
    organisation_id: Identifier | None = Field(
        None, description="Which of the account's organisations; null: its own.", examples=["org_5d41402abc4b2a76"]
    )
    project_id: OptionalProject = Field(
        None,
        description="Which project the token is for; null: the oldest project in which models may be used, none if "
        "there is none.",
    )


class MfaAnswer(Given):
    """A second factor."""

    challenge: Token = Field(description="`challenge` of the answer to the login.", examples=["hfc_0123456789"])
    code: Code = Field(description="A code of the authenticator app, or a recovery code.")


class RefreshToken(Given):
    """A refresh token to be traded for new tokens."""

    refresh_token: Token = Field(description="It can be used once.", examples=["hfr_0123456789"])
    organisation_id: Identifier | None = Field(
        None, description="Changes the organisation; null: as before.", examples=["org_5d41402abc4b2a76"]
    )
    project_id: OptionalProject = Field(
        None,
        description="Changes the project; null: as before, or in another organisation and where that project is gone "
        "the oldest project in which models may be used, none if there is none.",
    )


class SessionEnd(Given):
    """Which session ends."""

    refresh_token: Token = Field(description="The refresh token of the session.", examples=["hfr_0123456789"])


class Redemption(Given):
    """A token of an invitation or a reset, and a password."""

    token: Token = Field(description="`token` of the invitation or reset.")
    password: Password = Field(
        description="The new password; for an account that exists and accepts an invitation: the one that it has.",
        examples=["four random words"],
    )
    name: Name | None = Field(None, description="Only for a new account.", examples=["Ada Lovelace"])


class Tokens(Shown):
    """A session's tokens."""

    access_token: str = Field(description="A JWT, for `Authorization: Bearer`.", examples=[_JWT])
    token_type: Literal["Bearer"] = Field(description="Always `Bearer`.", examples=["Bearer"])
    expires_in: int = Field(description="Seconds until the access token expires.", examples=[3600])
    refresh_token: str = Field(description="To be used once, for new tokens.", examples=["hfr_0123456789"])
    refresh_expires_in: int = Field(description="Seconds until the refresh token expires.", examples=[86400])
    session_id: str = Field(description="The session.", examples=["ses_0cc175b9c0f1b6a8"])


class MfaChallenge(Shown):
    """The password is right, a second factor is wanted."""

    challenge: str = Field(description="For `/auth/mfa/verify`, within five minutes.", examples=["hfc_0123456789"])


class Redeemed(Shown):
    """The account that the token was for."""

    account_id: str = Field(description="The account.", examples=["user_6b86b273ff34fce1"])
    email: str = Field(description="Its e-mail, to sign in with.", examples=["ada@example.com"])


def _show_tokens(message: sessions_pb2.LoginResponse) -> Tokens:
    return Tokens(
        access_token=message.access_token,
        token_type="Bearer",  # noqa: S106
        expires_in=message.expires_in,
        refresh_token=message.refresh_token,
        refresh_expires_in=message.refresh_expires_in,
        session_id=message.session_id,
    )


def _show_login(message: sessions_pb2.LoginResponse) -> Tokens | MfaChallenge:
    return MfaChallenge(challenge=message.challenge) if message.challenge else _show_tokens(message)


@endpoint(
    "POST",
    "/auth/login",
    SESSIONS["Login"],
    Tokens | MfaChallenge,
    show=_show_login,
    timeout_s=PASSWORD_TIMEOUT_S,
    errors=_NOT_LET_IN,
)
def login(body: Credentials) -> sessions_pb2.LoginRequest:
    """Signs in with e-mail and password. Answers with tokens, or with a challenge where a second factor is wanted.

    401 `invalid_credentials` for an unknown e-mail and a wrong password alike; 429 `too_many_attempts` while locked
    out. With the right password 403 `permission_denied` for an account that is suspended or a member nowhere, and 404
    `not_found` for an organisation or project that is not the account's.
    """
    return sessions_pb2.LoginRequest(**body.given())


@endpoint("POST", "/auth/refresh", SESSIONS["Refresh"], Tokens, show=_show_tokens, errors=_NOT_LET_IN)
def refresh(body: RefreshToken) -> sessions_pb2.RefreshRequest:
    """Trades a refresh token for new tokens. A token that is used twice ends its session."""
    return sessions_pb2.RefreshRequest(**body.given())


@endpoint("POST", "/auth/logout", SESSIONS["Logout"])
def logout(body: SessionEnd) -> sessions_pb2.LogoutRequest:
    """Ends a session. An unknown token is no error."""
    return sessions_pb2.LogoutRequest(**body.given())


@endpoint(
    "POST",
    "/auth/redeem",
    SESSIONS["RedeemToken"],
    Redeemed,
    timeout_s=PASSWORD_TIMEOUT_S,
    errors=(401, 403, 409),
)
def redeem(body: Redemption) -> sessions_pb2.RedeemTokenRequest:
    """Accepts an invitation or resets a password, with the token of it. Signs nobody in.

    Who has an account already accepts with its password; otherwise this sets one.
    """
    return sessions_pb2.RedeemTokenRequest(**body.given())


@endpoint(
    "POST",
    "/auth/mfa/verify",
    SESSIONS["VerifyMfa"],
    Tokens,
    show=_show_tokens,
    timeout_s=PASSWORD_TIMEOUT_S,
    errors=_NOT_LET_IN,
)
def verify_mfa(body: MfaAnswer) -> sessions_pb2.VerifyMfaRequest:
    """Finishes signing in with the second factor."""
    return sessions_pb2.VerifyMfaRequest(**body.given())


ENDPOINTS = (login, refresh, logout, redeem, verify_mfa)
