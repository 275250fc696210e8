"""Calls of the auth service: one RPC with what says who asks, within a deadline."""

import ipaddress
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Final
from urllib.parse import quote, unquote

import grpc
from fastapi import Request
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from helixflow.console.problems import request_id_of
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.access import AUTHORIZATION, CLIENT_ADDRESS, CLIENT_SOFTWARE, IDEMPOTENCY_KEY, REQUEST_ID, Level
from helixflow.rpc.errors import from_rpc_error

Metadata = tuple[tuple[str, str], ...]
# gRPC refuses metadata above 8 KiB; an access token has about 1.3 KiB.
_CREDENTIAL: Final = re.compile(r"[\x20-\x7e]{1,4096}")
_MAX_SOFTWARE: Final = 200


def metadata_of(request: Request, level: Level, idempotency_key: str | None = None) -> Metadata:
    """What travels with the RPC. The address and the request's id are the gateway's word; a credential goes along
    where one is needed. Raises `HelixError` INVALID_TOKEN for a credential that cannot be one.
    """
    metadata = [(REQUEST_ID, request_id_of(request.scope))]
    credentials = request.headers.getlist("authorization")
    if credentials and level is not Level.PUBLIC:
        if len(credentials) != 1 or _CREDENTIAL.fullmatch(credentials[0]) is None:
            raise HelixError(ErrorKind.INVALID_TOKEN, "Send one credential: 'Authorization: Bearer <token or key>'.")
        metadata.append((AUTHORIZATION, credentials[0].strip()))
    if address := _address_of(request.headers.get("x-forwarded-for", "")):
        metadata.append((CLIENT_ADDRESS, address))
    if software := request.headers.get("user-agent", ""):
        metadata.append((CLIENT_SOFTWARE, _encode(software)))
    if idempotency_key is not None:
        metadata.append((IDEMPOTENCY_KEY, idempotency_key))
    return tuple(metadata)


def _address_of(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text.strip()))
    except ValueError:
        return ""


def _encode(software: str) -> str:
    """Percent-encoded, cut where a character ends."""
    encoded = quote(software[:_MAX_SOFTWARE], safe=" /;:,()+=")[:_MAX_SOFTWARE]
    while "\ufffd" in unquote(encoded) or re.search(r"%[0-9A-F]?$", encoded):
        encoded = encoded[:-1]
    return encoded.strip()


def unary(
    channel: grpc.aio.Channel, method: MethodDescriptor, timeout_s: float
) -> Callable[[Message, Metadata], Awaitable[Message]]:
    """A function that calls `method`. It raises `HelixError`, as the service did or for gRPC's own failures."""
    call: Any = channel.unary_unary(_path(method), **_codecs(method))

    async def ask(message: Message, metadata: Metadata) -> Message:
        try:
            answer: Message = await call(message, metadata=metadata, timeout=timeout_s)
        except grpc.RpcError as exc:
            raise from_rpc_error(exc) from exc
        return answer

    return ask


def streaming(
    channel: grpc.aio.Channel, method: MethodDescriptor, timeout_s: float
) -> Callable[[Message, Metadata], AsyncGenerator[Message, None]]:
    """A function that calls `method` and gives its messages as they come; closing the iterator ends the call."""
    call: Any = channel.unary_stream(_path(method), **_codecs(method))

    async def ask(message: Message, metadata: Metadata) -> AsyncGenerator[Message, None]:
        answers = call(message, metadata=metadata, timeout=timeout_s)
        try:
            async for answer in answers:
                yield answer
        except grpc.RpcError as exc:
            raise from_rpc_error(exc) from exc
        finally:
            answers.cancel()

    return ask


def _path(method: MethodDescriptor) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


def _codecs(method: MethodDescriptor) -> dict[str, Any]:
    return {
        "request_serializer": GetMessageClass(method.input_type).SerializeToString,
        "response_deserializer": GetMessageClass(method.output_type).FromString,
    }
