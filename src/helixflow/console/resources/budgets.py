"""Budgets: of money or tokens, for each day or month or as a total; and the thresholds that were reached."""

from typing import Annotated, Any

from fastapi import Path, Query
from pydantic import Field

from helixflow.console.endpoint import USAGE, endpoint
from helixflow.console.fields import Identifier, Moment, OptionalMoment, Shape
from helixflow.console.models import Changes, Given, Page, Shown, absent
from helixflow.console.resources.limits import OrganisationFilter, SubjectFilter, list_request
from helixflow.console.words import (
    BudgetScopeWord,
    PeriodWord,
    ShownPeriod,
    ShownScope,
    ShownUnit,
    UnitWord,
    number_of,
)
from helixflow.rpc.generated.auth_v1 import admin_pb2, metering_pb2, usage_pb2

_ID = ["budget_ef2d127de37b942baad06145"]
_ORGANISATION = ["org_5d41402abc4b2a76b9719d91"]
_SUBJECT = ["proj_37913d99a1ae28e3195d7a1f"]
_THRESHOLDS = [[50, 80, 100]]
Id = Annotated[Identifier, Path(description="The budget.", examples=_ID)]
# Decimal text: no JSON number, which clients read as a float.
Cap = Annotated[
    str,
    Field(min_length=1, max_length=20, examples=["250.00"]),
    Shape(r"^[0-9]{1,16}(\.[0-9]{1,9})?$", "must be a decimal number such as 250.00, as text"),
]
Thresholds = Annotated[
    list[Annotated[int, Field(ge=1, le=100, examples=[80])]], Field(min_length=1, max_length=10, examples=_THRESHOLDS)
]


class Budget(Shown):
    """At most so much money or so many tokens in a period."""

    id: str = Field(description="Its id.", examples=_ID)
    organisation_id: str = Field(description="The organisation.", examples=_ORGANISATION)
    scope: ShownScope = Field(description="What it is on.", examples=["project"])
    subject_id: str = Field(description="The key, project or organisation.", examples=_SUBJECT)
    unit: ShownUnit = Field(description="US dollars, or prompt and completion tokens together.", examples=["money"])
    period: ShownPeriod = Field(description="When it begins anew, at midnight UTC; a total never.", examples=["month"])
    cap: str = Field(description="How much, as a decimal number.", examples=["250.00"])
    spent: str = Field(
        description="In this period, by the ledger; what runs at the moment is not in it.", examples=["12.345"]
    )
    period_start: OptionalMoment = Field(
        description="Start of this period; null for a total.", examples=["2026-11-01T00:00:00Z"]
    )
    period_end: OptionalMoment = Field(
        description="End of this period; null for a total.", examples=["2026-12-01T00:00:00Z"]
    )
    thresholds: list[int] = Field(description="Per cent of it at which an event is raised.", examples=_THRESHOLDS)
    imposed: bool = Field(description="By an operator of the installation: only they can change it.", examples=[False])
    created_at: Moment = Field(description="When it was made.")
    updated_at: Moment = Field(description="When it was last changed.")
    version: int = Field(description="Counts its changes; the `ETag`.", examples=[1])


class BudgetPage(Page[Budget]):
    """One page of budgets."""


class NewBudget(Given):
    """A budget to be made."""

    scope: BudgetScopeWord = Field(description="What it is on.", examples=["project"])
    subject_id: Identifier | None = Field(
        None, description="The key or project; null: the organisation itself.", examples=_SUBJECT
    )
    unit: UnitWord = Field(description="US dollars, or prompt and completion tokens together.", examples=["money"])
    period: PeriodWord = Field(description="When it begins anew, at midnight UTC; a total never.", examples=["month"])
    cap: Cap = Field(description="How much: dollars with up to nine decimals, or a whole number of tokens.")
    thresholds: Thresholds | None = Field(
        None,
        description="Per cent of it at which an event is raised, growing; null: 50, 80 and 100.",
        examples=_THRESHOLDS,
    )
    imposed: bool = Field(False, description="Whether only operators may change it; for operators.")
    organisation_id: Identifier | None = Field(
        None, description="Another organisation, to impose it on; null: the caller's.", examples=_ORGANISATION
    )


class BudgetChanges(Changes):
    """What changes; the rest stays."""

    cap: Cap = absent("How much: dollars with up to nine decimals, or a whole number of tokens.")
    thresholds: Thresholds = absent("Per cent of it at which an event is raised, growing.")


class BudgetEvent(Shown):
    """A threshold that was reached; each once a period."""

    id: str = Field(description="Its id.", examples=["event_6b86b273ff34fce19d6b804e"])
    budget_id: str = Field(description="The budget.", examples=_ID)
    threshold: int = Field(description="Per cent of the cap.", examples=[80])
    spent: str = Field(description="What had been spent, as a decimal number.", examples=["201.5"])
    cap: str = Field(description="The cap then.", examples=["250.00"])
    period_start: OptionalMoment = Field(
        description="Start of its period; null for a total.", examples=["2026-11-01T00:00:00Z"]
    )
    at: Moment = Field(description="When it was noticed.")


class BudgetEventPage(Page[BudgetEvent]):
    """One page of events."""


@endpoint("GET", "/budgets", USAGE["ListBudgets"], BudgetPage)
def list_budgets(
    scope: Annotated[BudgetScopeWord | None, Query(description="Only those on this.")] = None,
    subject_id: SubjectFilter = None,
    organisation_id: OrganisationFilter = None,
) -> usage_pb2.ListPoliciesRequest:
    """Budgets of the organisation, newest first, with what is spent of them."""
    return list_request(scope, subject_id, organisation_id)


@endpoint("POST", "/budgets", USAGE["CreateBudget"], Budget, location="/budgets/{0.id}")
def create_budget(body: NewBudget) -> usage_pb2.CreateBudgetRequest:
    """Makes a budget; in force everywhere within a second. What was spent in this period counts. 409 when there is one
    of its kind already.
    """
    given = body.given()
    given["scope"] = number_of(metering_pb2.Scope, given["scope"])
    given["unit"] = number_of(metering_pb2.BudgetUnit, given["unit"])
    given["period"] = number_of(metering_pb2.BudgetPeriod, given["period"])
    return usage_pb2.CreateBudgetRequest(**given)


@endpoint("GET", "/budgets/{id}", USAGE["GetBudget"], Budget)
def get_budget(id: Id) -> admin_pb2.GetRequest:
    """One budget, with what is spent of it."""
    return admin_pb2.GetRequest(id=id)


@endpoint("PATCH", "/budgets/{id}", USAGE["UpdateBudget"], Budget)
def update_budget(id: Id, body: BudgetChanges) -> usage_pb2.UpdateBudgetRequest:
    """Changes a budget; in force everywhere within a second. With a larger cap, thresholds that are not reached any
    more can be reached again.
    """
    present: dict[str, Any] = body.present()
    if "thresholds" in present:
        present["thresholds"] = usage_pb2.Int32List(values=present["thresholds"])
    return usage_pb2.UpdateBudgetRequest(id=id, **present)


@endpoint("DELETE", "/budgets/{id}", USAGE["DeleteBudget"])
def delete_budget(id: Id) -> admin_pb2.DeleteRequest:
    """Deletes a budget; its events stay."""
    return admin_pb2.DeleteRequest(id=id)


@endpoint("GET", "/budget-events", USAGE["ListBudgetEvents"], BudgetEventPage)
def list_budget_events(
    budget_id: Annotated[
        Identifier | None, Query(description="Only of this budget; none: of all.", examples=_ID)
    ] = None,
) -> usage_pb2.ListBudgetEventsRequest:
    """Thresholds that were reached, newest first."""
    return usage_pb2.ListBudgetEventsRequest(budget_id=budget_id or "")


ENDPOINTS = (list_budgets, create_budget, get_budget, update_budget, delete_budget, list_budget_events)
