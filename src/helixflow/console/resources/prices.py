"""Prices, and what the ledger costs by them."""

from typing import Annotated, Any, Literal

from fastapi import Path, Query
from pydantic import BeforeValidator, Field

from helixflow.console.endpoint import USAGE, endpoint
from helixflow.console.fields import GivenFlag, GivenMoment, Identifier, OptionalMoment, OptionalText, Shape
from helixflow.console.models import Given, Page, Shown
from helixflow.rpc.generated.auth_v1 import usage_pb2

_CHECK_TIMEOUT_S = 600.0
_MAX_TIERS = 16
_MAX_TOKENS = 1_000_000_000
_VERSION = ["9f86d081884c7d65"]
_ID = ["price_9f86d081884c7d65a1b2c3d4"]
Id = Annotated[Identifier, Path(description="The price.", examples=_ID)]
Amount = Annotated[
    str,
    Field(examples=["2.50"]),
    Shape(r"^[0-9]{1,7}(\.[0-9]{1,9})?$", "must be a number of US dollars such as 2.50, with at most nine decimals"),
]
SubjectName = Annotated[
    str,
    Field(min_length=1, max_length=260, examples=["gpt-4o", "gpt-4o/openai-0"]),
    Shape(r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]*$", "must be the name of a model or deployment"),
]


class Tier(Given):
    """Rates for all tokens of requests with so many prompt tokens."""

    from_prompt_tokens: Annotated[
        int, Field(ge=1, le=_MAX_TOKENS, description="From this many on; each tier's more.", examples=[200_000])
    ]
    input: Amount | None = Field(None, description="For a million prompt tokens; null: nothing.", examples=["2.50"])
    cached_input: Amount | None = Field(
        None, description="For those that the engine had cached; null: as `input`.", examples=["1.25"]
    )
    output: Amount | None = Field(
        None, description="For a million completion tokens; null: nothing.", examples=["10.00"]
    )


class GivenRates(Given):
    """What is charged, in US dollars."""

    input: Amount | None = Field(None, description="For a million prompt tokens; null: nothing.", examples=["2.50"])
    cached_input: Amount | None = Field(
        None, description="For those that the engine had cached; null: as `input`.", examples=["1.25"]
    )
    output: Amount | None = Field(
        None, description="For a million completion tokens; null: nothing.", examples=["10.00"]
    )
    request: Amount | None = Field(None, description="For each request; null: nothing.", examples=["0.001"])
    engine_second: Amount | None = Field(
        None, description="For each second that the engine worked on it; null: nothing.", examples=["0.0002"]
    )
    tiers: list[Tier] = Field(
        [], max_length=_MAX_TIERS, description="Other rates for long prompts, growing.", examples=[[]]
    )


class ShownTier(Shown):
    """Rates for all tokens of requests with so many prompt tokens."""

    from_prompt_tokens: int = Field(description="From this many on.", examples=[200_000])
    input: str = Field(description="For a million prompt tokens.", examples=["5.00"])
    cached_input: str = Field(description="For those that the engine had cached.", examples=["2.50"])
    output: str = Field(description="For a million completion tokens.", examples=["15.00"])


class Rates(Shown):
    """What is charged, in US dollars."""

    input: str = Field(description="For a million prompt tokens.", examples=["2.50"])
    cached_input: str = Field(description="For those that the engine had cached.", examples=["1.25"])
    output: str = Field(description="For a million completion tokens.", examples=["10.00"])
    request: str = Field(description="For each request.", examples=["0.00"])
    engine_second: str = Field(description="For each second that the engine worked on it.", examples=["0.00"])
    tiers: Annotated[list[ShownTier], BeforeValidator(list)] = Field(
        description="Other rates for long prompts, growing."
    )


class Price(Shown):
    """What a model or a deployment charges, and when."""

    id: OptionalText = Field(description="Its id; null where nobody has set it.", examples=_ID)
    price_version: str = Field(
        validation_alias="version", description="What requests keep that were rated by it.", examples=_VERSION
    )
    subject_kind: OptionalText = Field(
        description="`model` or `deployment`; null where a version was asked for.", examples=["model"]
    )
    subject: OptionalText = Field(description="Which one.", examples=["gpt-4o"])
    rates: Rates = Field(description="What is charged.")
    valid_from: OptionalMoment = Field(description="Since when; null where nobody has set it.")
    valid_to: OptionalMoment = Field(description="Until when; null: until further notice.")
    source: str = Field(
        description="`set` by an operator; `genai-prices`, its release and the model there, and what it prices that we "
        "do not tell apart; or `default`.",
        examples=["set"],
    )
    created_at: OptionalMoment = Field(description="When it was set, or first used.")


class PricePage(Page[Price]):
    """One page of prices."""


class NewPrice(Given):
    """A price to be set."""

    subject_kind: Literal["model", "deployment"] = Field(description="What it is for.", examples=["model"])
    subject: SubjectName = Field(
        description="The public name of the model, or the name of the deployment.", examples=["gpt-4o"]
    )
    rates: GivenRates = Field(description="What is charged.")
    valid_from: GivenMoment | None = Field(
        None,
        description="From then on, not in the past; null: from now on. A price without end before it ends there.",
        examples=["2027-01-01T00:00:00Z"],
    )
    valid_to: GivenMoment | None = Field(
        None, description="Before that time; null: until further notice.", examples=["2027-02-01T00:00:00Z"]
    )


class RatingDifference(Shown):
    """A request that costs something else."""

    call_id: str = Field(description="The request.", examples=["0199a1b2c3d4e5f60718293a4b5c6d7e"])
    recorded: str = Field(description="What it was charged, US dollars.", examples=["0.0125"])
    rated: OptionalText = Field(description="What it costs; null: its price is not known.", examples=["0.0126"])
    price_version: str = Field(description="The price that it was rated by.", examples=_VERSION)


class RatingProgress(Shown):
    """What was found so far."""

    rows: int = Field(description="Requests that were rated again.", examples=[5000])
    differing: int = Field(description="Those of them that cost something else.", examples=[0])
    recorded: str = Field(description="What they were charged in all, US dollars.", examples=["12.34"])
    rated: str = Field(description="What they cost.", examples=["12.34"])
    differences: Annotated[list[RatingDifference], BeforeValidator(list)] = Field(
        description="The first few that differ."
    )
    done: bool = Field(description="Whether this is all.")


@endpoint("GET", "/prices", USAGE["ListPrices"], PricePage)
def list_prices(
    subject: Annotated[
        SubjectName | None, Query(description="Only of this model or deployment.", examples=["gpt-4o"])
    ] = None,
) -> usage_pb2.ListPricesRequest:
    """What deployments cost for which nobody has set a price, then all prices that were ever set, the latest first."""
    return usage_pb2.ListPricesRequest(subject=subject or "")


@endpoint("GET", "/prices/current", USAGE["GetPrice"], Price)
def get_price(
    subject: Annotated[
        SubjectName, Query(description="A model, a deployment, or a version of a price.", examples=["gpt-4o"])
    ],
    at: Annotated[GivenMoment | None, Query(description="As it is then; none: now.")] = None,
) -> usage_pb2.GetPriceRequest:
    """What a deployment costs; a model, which is what its first deployment costs where nobody has set a price for it;
    or what stands behind a version that a request was rated by.
    """
    return usage_pb2.GetPriceRequest(subject=subject, at=at or 0)


@endpoint("POST", "/prices", USAGE["SetPrice"], Price, location="/prices/current?subject={0.price_version}")
def set_price(body: NewPrice) -> usage_pb2.SetPriceRequest:
    """Sets what a model or a deployment costs from a moment on. Prices of a deployment go before those of its model."""
    given: dict[str, Any] = body.given()
    return usage_pb2.SetPriceRequest(**given)


@endpoint("DELETE", "/prices/{id}", USAGE["EndPrice"], Price)
def end_price(
    id: Id, at: Annotated[GivenMoment | None, Query(description="Then, not in the past; none: now.")] = None
) -> usage_pb2.EndPriceRequest:
    """Ends a price that was set. One that has not begun by then is withdrawn: it is answered with `valid_to` as
    `valid_from`, and the price that it would have ended goes on. 409 for one that has ended already.
    """
    return usage_pb2.EndPriceRequest(id=id, at=at or 0)


@endpoint("GET", "/prices/check", USAGE["CheckRating"], RatingProgress, timeout_s=_CHECK_TIMEOUT_S)
def check_rating(
    from_: Annotated[
        GivenMoment | None, Query(alias="from", description="Requests admitted at or after this time.")
    ] = None,
    to: Annotated[GivenMoment | None, Query(description="Requests admitted before this time.")] = None,
    current: Annotated[
        GivenFlag, Query(description="By the prices that are known now for that time, not by those recorded.")
    ] = False,
) -> usage_pb2.CheckRatingRequest:
    """Rates requests again and says what differs; changes nothing. JSON Lines: what was found so far, the last one with
    `done`. It ends early, with the connection cut, when something fails on the way.
    """
    asked: dict[str, Any] = {"from": from_ or 0, "to": to or 0, "current": current}
    return usage_pb2.CheckRatingRequest(**asked)


ENDPOINTS = (list_prices, get_price, set_price, end_price, check_rating)
