"""What an endpoint is: a path and method bound to one RPC, with a function that makes the RPC's request."""

import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from pydantic import BaseModel
from starlette.responses import Response

from helixflow.rpc.access import Access, access_of
from helixflow.rpc.generated.auth_v1 import admin_pb2, configuration_pb2, fleet_pb2, sessions_pb2, usage_pb2

ADMIN: Final[Mapping[str, MethodDescriptor]] = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].methods_by_name
SESSIONS: Final[Mapping[str, MethodDescriptor]] = sessions_pb2.DESCRIPTOR.services_by_name[
    "SessionService"
].methods_by_name
USAGE: Final[Mapping[str, MethodDescriptor]] = usage_pb2.DESCRIPTOR.services_by_name["UsageService"].methods_by_name
CONFIGURATION: Final[Mapping[str, MethodDescriptor]] = configuration_pb2.DESCRIPTOR.services_by_name[
    "ConfigurationService"
].methods_by_name
FLEET: Final[Mapping[str, MethodDescriptor]] = fleet_pb2.DESCRIPTOR.services_by_name["FleetService"].methods_by_name
RPC_TIMEOUT_S: Final = 10.0
# Where passwords are checked: they queue.
PASSWORD_TIMEOUT_S: Final = 15.0

Verb = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
# Calls an RPC in the name of who asks. Raises `HelixError`.
Ask = Callable[[MethodDescriptor, Message], Awaitable[Any]]
# From the RPC's request and the parameters by name, the answer.
Compose = Callable[[Ask, Any, Mapping[str, Any]], Awaitable[BaseModel | Response]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One operation of the API.

    `convert` makes the RPC's request from the parameters that it names in its signature, as FastAPI does; what follows
    from the RPC is added by `binding`: pages (`limit`, `cursor`), `If-Match` where the request has `if_version`,
    `Idempotency-Key`. `show` makes the answer, of type `answer`, from the RPC's; without it the answer is 204.
    `location` is a format string over the answer for what was created (`/projects/{0.id}`). `versioned` false: the
    request's `if_version` is not offered, since nothing shows a version. `errors` are the statuses of errors that are
    its own, beside those that follow from the RPC's declaration.
    An answer that takes more than one call, or has another form too (`media_type`), is made by `compose`; what takes a
    second endpoint for the same RPC has a `name` of its own.
    """

    verb: Verb
    path: str
    method: MethodDescriptor
    convert: Callable[..., Message]
    answer: Any
    show: Callable[[Any], BaseModel] | None
    location: str | None
    timeout_s: float
    versioned: bool
    errors: frozenset[int]
    name: str
    compose: Compose | None
    media_type: str | None

    @property
    def access(self) -> Access:
        return access_of(self.method)

    @property
    def status(self) -> int:
        if self.show is None and not self.method.server_streaming:
            return 204
        return 201 if self.location is not None else 200

    @property
    def paged(self) -> bool:
        return "page_size" in self.method.input_type.fields_by_name

    @property
    def conditional(self) -> bool:
        """Whether it may depend on a version of what it changes."""
        return self.versioned and "if_version" in self.method.input_type.fields_by_name

    @property
    def cacheable(self) -> bool:
        """Whether the answer is one resource with a version, that a client may have already."""
        return self.verb == "GET" and self.shows_version

    @property
    def shows_version(self) -> bool:
        """Whether the answer counts its changes, which makes its `ETag`."""
        field = self.method.output_type.fields_by_name.get("version")
        return field is not None and field.cpp_type == FieldDescriptor.CPPTYPE_INT64

    @property
    def description(self) -> str:
        """The docstring of `convert`."""
        return inspect.getdoc(self.convert) or ""


def endpoint(
    verb: Verb,
    path: str,
    method: MethodDescriptor,
    answer: Any = None,
    *,
    show: Callable[[Any], BaseModel] | None = None,
    location: str | None = None,
    timeout_s: float = RPC_TIMEOUT_S,
    versioned: bool = True,
    errors: Iterable[int] = (),
    name: str | None = None,
    compose: Compose | None = None,
    media_type: str | None = None,
) -> Callable[[Callable[..., Message]], Endpoint]:
    """Makes an `Endpoint` of a conversion. `path` is without /api/v1. `show` defaults to validating `answer`."""
    if show is None and answer is not None:
        show = answer.model_validate

    def declare(convert: Callable[..., Message]) -> Endpoint:
        return Endpoint(
            verb,
            path,
            method,
            convert,
            answer,
            show,
            location,
            timeout_s,
            versioned,
            frozenset(errors),
            name or method.name,
            compose,
            media_type,
        )

    return declare
