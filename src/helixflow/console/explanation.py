"""How a request was authorised, limited, routed, tried again and priced: its row in the ledger, told by topic."""

from collections.abc import Mapping
from typing import Any, Final

import msgspec
from pydantic import Field

from helixflow.console.endpoint import USAGE, Ask
from helixflow.console.fields import MomentMs, OptionalId, OptionalMs, OptionalText, Texts
from helixflow.console.models import Shown
from helixflow.console.resources.prices import Rates
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.money import format_dollars
from helixflow.metering.rows import Explanation
from helixflow.rpc.generated.auth_v1 import admin_pb2, usage_pb2

# Why rates are not shown; anything else fails the answer.
_NOT_SHOWN: Final = (ErrorKind.PERMISSION_DENIED, ErrorKind.NOT_FOUND)


class Authorisation(Shown):
    """As whom it was let in."""

    organisation_id: str = Field(description="Whose it was.", examples=["org_5d41402abc4b2a76b9719d91"])
    project_id: str = Field(description="In which project.", examples=["proj_37913d99a1ae28e3195d7a1f"])
    key_id: OptionalId = Field(description="With which key; null: with an access token.", examples=["key_7902699be42c"])
    user_id: OptionalId = Field(description="As whom.", examples=["user_6b86b273ff34fce19d6b804e"])
    by: OptionalText = Field(description="What let it in.", examples=["key"])


class Limitation(Shown):
    """What it had to fit, and what was reserved for it until it ended."""

    policies: Texts = Field(description="The limits and budgets that applied.", examples=[["lim_1", "bud_1"]])
    reserved_tokens: int = Field(description="Tokens that were reserved.", examples=[4096])
    reserved_cost: str = Field(description="What was reserved of budgets, US dollars.", examples=["0.0123"])


class Attempt(Shown):
    """A deployment that was tried beside the one that answered."""

    deployment: str = Field(description="Which one.", examples=["smollm2-135m-instruct/llama_cpp-0"])
    error: str = Field(
        description="The error's code; `hedged`: another one was quicker, and the cost includes this one's.",
        examples=["upstream_unavailable"],
    )


class Routing(Shown):
    """What it asked for and where it went."""

    model: str = Field(description="The model that was asked for.", examples=["smollm2-135m-instruct"])
    dialect: str = Field(description="Which API it spoke.", examples=["openai"])
    operation: str = Field(description="What it was: the path below `/v1`.", examples=["chat/completions"])
    stream: bool = Field(description="Whether the answer was streamed.", examples=[True])
    deployment: OptionalText = Field(
        description="What served it, or was tried last.", examples=["smollm2-135m-instruct/llama_cpp-0"]
    )
    queue_ms: OptionalMs = Field(description="How long it waited for an engine, milliseconds.", examples=[3])
    first_token_ms: OptionalMs = Field(description="Until the first token, milliseconds.", examples=[180])
    duration_ms: OptionalMs = Field(description="Until its end, milliseconds.", examples=[920])
    journal_id: OptionalText = Field(
        description="The journal of the gateway that took it.", examples=["0f5a3c9d1b7e4a2680c4d6e8"]
    )


class Pricing(Shown):
    """What it cost, and by which price. `rates` is null where nothing was rated, or why `rates_withheld` says."""

    cost: str = Field(description="What it cost, US dollars.", examples=["0.000123"])
    price_version: OptionalText = Field(description="The price that it was rated by.", examples=["9f86d081884c7d65"])
    source: OptionalText = Field(description="Where the price is from.", examples=["set"])
    rates: Rates | None = Field(
        description="Its rates.",
        examples=[
            {
                "input": "2.50",
                "cached_input": "1.25",
                "output": "10.00",
                "request": "0.00",
                "engine_second": "0.00",
                "tiers": [],
            }
        ],
    )
    rates_withheld: OptionalText = Field(
        description="`permission_denied`: you may not read prices; `not_found`: they are not kept.",
        examples=["permission_denied"],
    )
    prompt_tokens: int = Field(description="Tokens of the prompt.", examples=[12])
    cached_tokens: int = Field(description="Those of them that the engine had cached.", examples=[0])
    completion_tokens: int = Field(description="Tokens that were generated.", examples=[34])
    reasoning_tokens: int = Field(description="Those of them that were reasoning.", examples=[0])
    engine_ms: OptionalMs = Field(description="How long the engine worked on it, milliseconds.", examples=[910])
    estimated: bool = Field(description="Whether we counted tokens, for the engine did not report them.")


class RequestExplanation(Shown):
    """Why a request went as it went."""

    call_id: str = Field(description="Its id in the ledger.", examples=["019abf3e6c0d4f0ab1c2d3e4f5a6b7c8"])
    request_id: str = Field(description="The `x-request-id` of its answer.", examples=["req_5c1a"])
    admitted_at: MomentMs = Field(description="When it was admitted.")
    status: int = Field(description="The HTTP status; 499: the client left.", examples=[200])
    outcome: str = Field(description="How it ended.", examples=["completed"])
    error: OptionalText = Field(description="The error's code.", examples=["upstream_unavailable"])
    authorised: Authorisation
    limited: Limitation
    routed: Routing
    retried: list[Attempt] = Field(description="What else was tried, in this order.")
    priced: Pricing


async def explain(ask: Ask, request: admin_pb2.GetRequest, _given: Mapping[str, Any]) -> RequestExplanation:
    """Asks for the request and for its price. Raises `HelixError`."""
    details = await ask(USAGE["DescribeRequest"], request)
    told = msgspec.json.decode(details.explanation, type=Explanation) if details.explanation else Explanation()
    price, withheld = await _price(ask, details.price_version)
    return RequestExplanation(
        call_id=details.call_id,
        request_id=details.request_id,
        admitted_at=details.admitted_at_ms,
        status=details.status,
        outcome=details.outcome,
        error=details.error,
        authorised=Authorisation(by=told.authorised_by, **_of(Authorisation, details)),
        limited=Limitation(
            policies=told.policies,
            reserved_tokens=told.reserved_tokens,
            reserved_cost=format_dollars(told.reserved_cost),
        ),
        routed=Routing(journal_id=told.journal_id, **_of(Routing, details)),
        retried=[Attempt(deployment=deployment, error=error) for deployment, error in told.attempts],
        priced=Pricing(
            source=price.source if price is not None else None,
            rates=Rates.model_validate(price.rates) if price is not None else None,
            rates_withheld=withheld,
            **_of(Pricing, details),
        ),
    )


async def _price(ask: Ask, version: str) -> tuple[usage_pb2.PriceEntry | None, str]:
    """The price of that version, or the code of why it is not shown."""
    if not version:
        return None, ""
    try:
        return await ask(USAGE["GetPrice"], usage_pb2.GetPriceRequest(subject=version)), ""
    except HelixError as exc:
        if exc.kind not in _NOT_SHOWN:
            raise
        return None, exc.code


def _of(model: type[Shown], details: usage_pb2.RequestDetails) -> dict[str, Any]:
    """The fields that the model has of the request."""
    known = details.DESCRIPTOR.fields_by_name
    return {name: getattr(details, name) for name in model.model_fields if name in known}
