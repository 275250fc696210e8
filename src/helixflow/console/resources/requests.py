"""Single requests: which there were, and why each went as it went."""

from typing import Annotated, Literal

from fastapi import Path, Query
from pydantic import Field

from helixflow.console.endpoint import USAGE, endpoint
from helixflow.console.explanation import RequestExplanation, explain
from helixflow.console.fields import Identifier, ModelName, MomentMs, OptionalId, OptionalMs, OptionalText, Shape
from helixflow.console.models import Page, Shown
from helixflow.console.resources.usage import From, To
from helixflow.rpc.generated.auth_v1 import admin_pb2, usage_pb2

Id = Annotated[
    Annotated[str, Field(min_length=1, max_length=128), Shape(r"^[A-Za-z0-9._:/=+-]+$", "must be the id of a request")],
    Path(description="Its call id, or the `x-request-id` of its answer.", examples=["req_5c1a"]),
]
Outcome = Literal["completed", "failed", "cancelled", "interrupted", "lost"]


class Request(Shown):
    """One request to a model."""

    call_id: str = Field(description="Its id in the ledger.", examples=["019abf3e6c0d4f0ab1c2d3e4f5a6b7c8"])
    request_id: str = Field(description="The `x-request-id` of its answer.", examples=["req_5c1a"])
    organisation_id: str = Field(description="Whose it was.", examples=["org_5d41402abc4b2a76b9719d91"])
    project_id: str = Field(description="In which project.", examples=["proj_37913d99a1ae28e3195d7a1f"])
    key_id: OptionalId = Field(description="With which key; null: with an access token.", examples=["key_7902699be42c"])
    user_id: OptionalId = Field(
        description="As which account or service account; null for a key of the project itself.",
        examples=["user_6b86b273ff34fce19d6b804e"],
    )
    model: str = Field(description="The model that was asked for.", examples=["smollm2-135m-instruct"])
    deployment: OptionalText = Field(
        description="What served it, or was tried last; null: it did not come to that.",
        examples=["smollm2-135m-instruct/llama_cpp-0"],
    )
    dialect: str = Field(description="Which API it spoke.", examples=["openai"])
    operation: str = Field(description="What it was: the path below `/v1`.", examples=["chat/completions"])
    stream: bool = Field(description="Whether the answer was streamed.", examples=[True])
    status: int = Field(description="The HTTP status; 499: the client left.", examples=[200])
    outcome: str = Field(
        description="`completed`, `failed`, `cancelled` (by the client), `interrupted` (the gateway ended) or `lost` "
        "(with its journal: charged in full).",
        examples=["completed"],
    )
    error: OptionalText = Field(description="The error's code.", examples=["upstream_unavailable"])
    prompt_tokens: int = Field(description="Tokens of the prompt.", examples=[12])
    cached_tokens: int = Field(description="Those of them that the engine had cached.", examples=[0])
    completion_tokens: int = Field(description="Tokens that were generated.", examples=[34])
    reasoning_tokens: int = Field(description="Those of them that were reasoning.", examples=[0])
    estimated: bool = Field(description="Whether we counted them, for the engine did not report them.")
    admitted_at: MomentMs = Field(description="When it was admitted.", validation_alias="admitted_at_ms")
    queue_ms: OptionalMs = Field(description="How long it waited for an engine, milliseconds.", examples=[3])
    first_token_ms: OptionalMs = Field(description="Until the first token, milliseconds.", examples=[180])
    duration_ms: OptionalMs = Field(description="Until its end, milliseconds.", examples=[920])
    engine_ms: OptionalMs = Field(description="How long the engine worked on it, milliseconds.", examples=[910])
    cost: str = Field(description="What it cost, US dollars.", examples=["0.000123"])
    price_version: OptionalText = Field(description="The price that it was rated by.", examples=["9f86d081884c7d65"])
    tags: dict[str, str] = Field(description="Its `metadata`.", examples=[{"team": "search"}])


class RequestPage(Page[Request]):
    """One page of requests."""


@endpoint("GET", "/requests", USAGE["ListRequests"], RequestPage)
def list_requests(
    since: From = None,
    until: To = None,
    project_id: Annotated[
        Identifier | None, Query(description="Only of this project.", examples=["proj_37913d99a1ae28e3195d7a1f"])
    ] = None,
    key_id: Annotated[
        Identifier | None, Query(description="Only with this key.", examples=["key_37913d99a1ae28e3195d7a1f"])
    ] = None,
    model: Annotated[ModelName | None, Query(description="Only to this model.")] = None,
    outcome: Annotated[Outcome | None, Query(description="Only those that ended so.")] = None,
) -> usage_pb2.ListRequestsRequest:
    """Requests that have ended, newest first, of 31 days at most. They show up within seconds."""
    request = usage_pb2.ListRequestsRequest(
        to=until or 0, project_id=project_id or "", key_id=key_id or "", model=model or "", outcome=outcome or ""
    )
    setattr(request, "from", since or 0)  # a keyword of Python
    return request


@endpoint("GET", "/requests/{id}", USAGE["DescribeRequest"], Request)
def describe_request(id: Id) -> admin_pb2.GetRequest:
    """One request. Of several with the same `x-request-id` it is the newest one."""
    return admin_pb2.GetRequest(id=id)


@endpoint(
    "GET",
    "/requests/{id}/explain",
    USAGE["DescribeRequest"],
    RequestExplanation,
    name="ExplainRequest",
    compose=explain,
)
def explain_request(id: Id) -> admin_pb2.GetRequest:
    """Why a request went as it went: how it was authorised, limited, routed, tried again and priced. The rates of its
    price are shown to who may read prices.
    """
    return admin_pb2.GetRequest(id=id)


ENDPOINTS = (list_requests, describe_request, explain_request)
