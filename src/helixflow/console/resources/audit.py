"""The audit log."""

from typing import Annotated, Literal

from fastapi import Query
from pydantic import Field

from helixflow.console.endpoint import ADMIN, endpoint
from helixflow.console.fields import Action, GivenFlag, GivenMoment, Hash, Identifier, JsonObject, Moment, OptionalText
from helixflow.console.models import Page, Shown
from helixflow.rpc.generated.auth_v1 import admin_pb2

_EXPORT_TIMEOUT_S = 600.0
ActorId = Annotated[
    Identifier | None, Query(description="Only what they did.", examples=["user_6b86b273ff34fce19d6b804e"])
]
TargetId = Annotated[
    Identifier | None, Query(description="Only what was done to it.", examples=["proj_37913d99a1ae28e3195d7a1f"])
]
Since = Annotated[GivenMoment | None, Query(description="Only records at or after this time.")]
Until = Annotated[GivenMoment | None, Query(description="Only records before this time.")]
Installation = Annotated[
    GivenFlag, Query(description="Records of the installation instead of the organisation's; for operators.")
]


class AuditRecord(Shown):
    """Who did what, on what, from where; chained to the record before by its hash."""

    organisation_id: OptionalText = Field(
        description="Whose log it is in; null: the installation's.", examples=["org_5d41402abc4b2a76b9719d91"]
    )
    sequence: int = Field(description="1, 2, 3 … in each log.", examples=[42])
    at: Moment = Field(description="When.")
    actor_kind: str = Field(description="`account`, `key`, `anonymous` or `system`.", examples=["account"])
    actor_id: OptionalText = Field(description="Who.", examples=["user_6b86b273ff34fce19d6b804e"])
    actor_name: OptionalText = Field(description="Their name at the time.", examples=["Ada Lovelace"])
    action: str = Field(description="What was done.", examples=["create_project"])
    outcome: str = Field(description="`done` or `denied`.", examples=["done"])
    reason: OptionalText = Field(description="With `denied`: the error's code.", examples=["permission_denied"])
    target_kind: OptionalText = Field(description="What kind of thing it was done to.", examples=["project"])
    target_id: OptionalText = Field(description="Which one.", examples=["proj_37913d99a1ae28e3195d7a1f"])
    before: JsonObject = Field(description="How it was; secrets are masked.")
    after: JsonObject = Field(description="How it became; secrets are masked.")
    address: OptionalText = Field(description="The client's address.", examples=["203.0.113.7"])
    request_id: OptionalText = Field(description="The request's id.", examples=["req_5c1a"])
    previous_hash: Hash = Field(description="SHA-256 of the record before, hexadecimal.")
    hash: Hash = Field(description="SHA-256 of this record, hexadecimal.")


class AuditRecordPage(Page[AuditRecord]):
    """One page of records."""


@endpoint("GET", "/audit/records", ADMIN["ListAuditRecords"], AuditRecordPage)
def list_audit_records(
    actor_id: ActorId = None,
    action: Annotated[Action | None, Query(description="Only this.")] = None,
    target_id: TargetId = None,
    outcome: Annotated[Literal["done", "denied"] | None, Query(description="Only what was done, or denied.")] = None,
    since: Since = None,
    until: Until = None,
    installation: Installation = False,
) -> admin_pb2.ListAuditRecordsRequest:
    """Records of the audit log, newest first."""
    return admin_pb2.ListAuditRecordsRequest(
        actor_id=actor_id or "",
        action=action or "",
        target_id=target_id or "",
        outcome=outcome or "",
        since=since or 0,
        until=until or 0,
        installation=installation,
    )


@endpoint("GET", "/audit/export", ADMIN["ExportAuditLog"], timeout_s=_EXPORT_TIMEOUT_S)
def export_audit_log(
    since: Since = None, until: Until = None, installation: Installation = False
) -> admin_pb2.ExportAuditLogRequest:
    """The audit log as JSON Lines, oldest first: a header, records, signed checkpoints. `helixflow audit verify` checks
    such an export without a server. It ends early, with the connection cut, when something fails on the way.
    """
    return admin_pb2.ExportAuditLogRequest(since=since or 0, until=until or 0, installation=installation)


ENDPOINTS = (list_audit_records, export_audit_log)
