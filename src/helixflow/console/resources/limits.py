"""Limits: on requests and tokens in a time, and on requests at the same time."""

from typing import Annotated, Any

from fastapi import Path, Query
from pydantic import Field

from helixflow.console.endpoint import USAGE, endpoint
from helixflow.console.fields import Identifier, ModelName, Moment, OptionalText
from helixflow.console.models import Changes, Given, Page, Shown, absent
from helixflow.console.words import MetricWord, ScopeWord, ShownMetric, ShownScope, number_of
from helixflow.rpc.generated.auth_v1 import admin_pb2, metering_pb2, usage_pb2

MAX_VALUE = 10**12
_ID = ["limit_4b227777d4dd1fc61c6f884f"]
_ORGANISATION = ["org_5d41402abc4b2a76b9719d91"]
_SUBJECT = ["proj_37913d99a1ae28e3195d7a1f"]
Id = Annotated[Identifier, Path(description="The limit.", examples=_ID)]
Value = Annotated[int, Field(ge=1, le=MAX_VALUE, examples=[600])]
Burst = Annotated[int, Field(ge=1, le=10 * MAX_VALUE, examples=[100])]
SubjectFilter = Annotated[
    Identifier | None,
    Query(
        description="Only what is on this; of a key also what is on keys that it was rotated from.", examples=_SUBJECT
    ),
]
OrganisationFilter = Annotated[
    Identifier | None,
    Query(description="Those of another organisation; for operators. None: the caller's.", examples=_ORGANISATION),
]


class Limit(Shown):
    """At most so many requests or tokens in a time, or requests at once."""

    id: str = Field(description="Its id.", examples=_ID)
    organisation_id: OptionalText = Field(
        description="The organisation; null for one of the installation.", examples=_ORGANISATION
    )
    scope: ShownScope = Field(description="What it is on.", examples=["project"])
    subject_id: OptionalText = Field(
        description="The key, user, project or organisation; null for the installation.", examples=_SUBJECT
    )
    model: OptionalText = Field(
        description="The model that it is for; null: all together.", examples=["smollm2-135m-instruct"]
    )
    metric: ShownMetric = Field(description="What is limited.", examples=["requests_per_minute"])
    value: int = Field(description="How many.", examples=[600])
    burst: int = Field(description="How many of them may come at once; 0 for parallel requests.", examples=[100])
    imposed: bool = Field(description="By an operator of the installation: only they can change it.", examples=[False])
    created_at: Moment = Field(description="When it was made.")
    updated_at: Moment = Field(description="When it was last changed.")
    version: int = Field(description="Counts its changes; the `ETag`.", examples=[1])


class LimitPage(Page[Limit]):
    """One page of limits."""


class NewLimit(Given):
    """A limit to be made."""

    scope: ScopeWord = Field(description="What it is on; the installation: only imposed.", examples=["project"])
    subject_id: Identifier | None = Field(
        None,
        description="The key, user (or service account) or project; null: the organisation or installation itself.",
        examples=_SUBJECT,
    )
    model: ModelName | None = Field(
        None, description="The model that it is for; null: all together.", examples=["smollm2-135m-instruct"]
    )
    metric: MetricWord = Field(description="What is limited.", examples=["requests_per_minute"])
    value: Value = Field(description="How many.")
    burst: Burst | None = Field(
        None,
        description="How many of them may come at once, up to 10 times the value; null: as many as the value. "
        "Parallel requests have none.",
        examples=[100],
    )
    imposed: bool = Field(False, description="Whether only operators may change it; for operators.")
    organisation_id: Identifier | None = Field(
        None, description="Another organisation, to impose it on; null: the caller's.", examples=_ORGANISATION
    )


class LimitChanges(Changes):
    """What changes; the rest stays."""

    value: Value = absent("How many.")
    burst: Burst = absent("How many of them may come at once; one that was as the value follows it.")


@endpoint("GET", "/limits", USAGE["ListLimits"], LimitPage)
def list_limits(
    scope: Annotated[ScopeWord | None, Query(description="Only those on this.")] = None,
    subject_id: SubjectFilter = None,
    organisation_id: OrganisationFilter = None,
) -> usage_pb2.ListPoliciesRequest:
    """Limits of the organisation, newest first; operators see those of the installation as well."""
    return list_request(scope, subject_id, organisation_id)


@endpoint("POST", "/limits", USAGE["CreateLimit"], Limit, location="/limits/{0.id}")
def create_limit(body: NewLimit) -> usage_pb2.CreateLimitRequest:
    """Makes a limit; in force everywhere within a second. 409 when there is one of its kind already."""
    given = body.given()
    given["scope"] = number_of(metering_pb2.Scope, given["scope"])
    given["metric"] = number_of(metering_pb2.Metric, given["metric"])
    return usage_pb2.CreateLimitRequest(**given)


@endpoint("GET", "/limits/{id}", USAGE["GetLimit"], Limit)
def get_limit(id: Id) -> admin_pb2.GetRequest:
    """One limit."""
    return admin_pb2.GetRequest(id=id)


@endpoint("PATCH", "/limits/{id}", USAGE["UpdateLimit"], Limit)
def update_limit(id: Id, body: LimitChanges) -> usage_pb2.UpdateLimitRequest:
    """Changes a limit; in force everywhere within a second."""
    present: dict[str, Any] = body.present()
    return usage_pb2.UpdateLimitRequest(id=id, **present)


@endpoint("DELETE", "/limits/{id}", USAGE["DeleteLimit"])
def delete_limit(id: Id) -> admin_pb2.DeleteRequest:
    """Deletes a limit."""
    return admin_pb2.DeleteRequest(id=id)


def list_request(
    scope: str | None, subject_id: str | None, organisation_id: str | None
) -> usage_pb2.ListPoliciesRequest:
    """For limits and budgets."""
    return usage_pb2.ListPoliciesRequest(
        scope=number_of(metering_pb2.Scope, scope or "unspecified"),
        subject_id=subject_id or "",
        organisation_id=organisation_id or "",
    )


ENDPOINTS = (list_limits, create_limit, get_limit, update_limit, delete_limit)
