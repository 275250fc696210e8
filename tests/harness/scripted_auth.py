"""An auth service that answers what a test tells it, over real gRPC, and remembers what it was asked."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from helixflow.rpc.channels import target_of
from helixflow.rpc.errors import ErrorInterceptor
from helixflow.rpc.generated.auth_v1 import admin_pb2, fleet_pb2, sessions_pb2, usage_pb2

_SERVICES = (
    admin_pb2.DESCRIPTOR.services_by_name["AdminService"],
    sessions_pb2.DESCRIPTOR.services_by_name["SessionService"],
    usage_pb2.DESCRIPTOR.services_by_name["UsageService"],
    fleet_pb2.DESCRIPTOR.services_by_name["FleetService"],
)


@dataclass(frozen=True, slots=True)
class Asked:
    """One call."""

    method: str
    request: Any
    metadata: dict[str, str]
    time_left_s: float


@dataclass(slots=True)
class ScriptedAuth:
    """`answers` by name of the RPC: a message, a list of messages for streams, or an exception, which is raised (last
    in such a list: after the others); an iterator gives one of these for each call. Without one an empty message.
    """

    channel: grpc.aio.Channel
    answers: dict[str, Any] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)

    @property
    def last(self) -> Asked:
        return self.asked[-1]

    def take(self, method: MethodDescriptor, request: Message, context: Any) -> Any:
        metadata = {key: value for key, value in context.invocation_metadata() if not key.startswith("grpc-")}
        self.asked.append(Asked(method.name, request, metadata, context.time_remaining()))
        answer = self.answers.get(method.name)
        if isinstance(answer, Iterator):
            answer = next(answer)
        if isinstance(answer, Exception):
            raise answer
        return GetMessageClass(method.output_type)() if answer is None else answer


@asynccontextmanager
async def scripted_auth(socket: Path) -> AsyncIterator[ScriptedAuth]:
    server = grpc.aio.server(interceptors=(ErrorInterceptor(),))
    server.add_insecure_port(target_of(socket))
    channel = grpc.aio.insecure_channel(target_of(socket), options=[("grpc.default_authority", "localhost")])
    auth = ScriptedAuth(channel)
    for service in _SERVICES:
        handlers = {method.name: _handler(auth, method) for method in service.methods}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))
    await server.start()
    try:
        yield auth
    finally:
        await channel.close()
        await server.stop(0)


def _handler(auth: ScriptedAuth, method: MethodDescriptor) -> Any:
    async def answer(request: Message, context: Any) -> Message:
        taken: Message = auth.take(method, request, context)
        return taken

    async def stream(request: Message, context: Any) -> AsyncIterator[Message]:
        for message in auth.take(method, request, context):
            if isinstance(message, Exception):
                raise message
            yield message

    codecs: dict[str, Callable[..., Any]] = {
        "request_deserializer": GetMessageClass(method.input_type).FromString,
        "response_serializer": GetMessageClass(method.output_type).SerializeToString,
    }
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(stream, **codecs)
    return grpc.unary_unary_rpc_method_handler(answer, **codecs)
