"""From RPCs to operations: who calls, whether they may, in which transaction, and what is remembered of it.

Every RPC of a service must have an operation, and declares in its proto who may call it: what is missing stops the
start.
"""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol
from urllib.parse import unquote

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from helixflow.auth.audit.entry import INSTALLATION, AuditEntry, Outcome
from helixflow.auth.authentication import Authentication
from helixflow.auth.caller import Caller, CallerKind, Source
from helixflow.auth.idempotency import Idempotency
from helixflow.auth.texts import check_storable
from helixflow.auth.unit import Unit, Units
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.access import (
    AUTHORIZATION,
    CLIENT_ADDRESS,
    CLIENT_SOFTWARE,
    IDEMPOTENCY_KEY,
    REQUEST_ID,
    Access,
    Level,
    declared_access,
)

_Context = grpc.aio.ServicerContext[Any, Any]
Run = Callable[[Unit, Any], Awaitable[Message]]
Prepare = Callable[[Any], Awaitable[Any]]
_MAX_METADATA: Final = 256
_REFUSALS: Final = (ErrorKind.PERMISSION_DENIED, ErrorKind.NOT_FOUND)


@dataclass(frozen=True, slots=True)
class Operation:
    """`run` does it within a transaction. `prepare` does first what takes long and needs none (hashing a password), for
    callers that would be let in; what it gives becomes `Unit.prepared`.
    """

    run: Run
    prepare: Prepare | None = None


@dataclass(frozen=True, slots=True)
class Invocation:
    """One call of an RPC whose operation makes its own transactions, with `units`."""

    caller: Caller
    access: Access
    action: str
    units: Units

    def writing(self, caller: Caller | None = None) -> Any:
        """A writing unit in the name of the caller, or of who the caller turned out to be."""
        return self.units.writing(caller or self.caller, self.access, self.action)

    def reading(self) -> Any:
        return self.units.reading(self.caller, self.access, self.action)


class Conversation(Protocol):
    """An operation that makes its own transactions: between them it does what takes long."""

    def __call__(self, invocation: Invocation, request: Any, /) -> Awaitable[Message]: ...


class Flow(Protocol):
    """An operation that answers with a stream."""

    def __call__(self, invocation: Invocation, request: Any, /) -> AsyncIterator[Message]: ...


class Dispatcher:
    """Serves operations. Errors are `HelixError`s; the server's interceptor renders them."""

    def __init__(self, units: Units, authentication: Authentication, idempotency: Idempotency) -> None:
        self._units = units
        self._authentication = authentication
        self._idempotency = idempotency
        self._writes: set[asyncio.Task[Message]] = set()

    def handler(
        self, service: ServiceDescriptor, operations: Mapping[str, Operation | Conversation | Flow]
    ) -> grpc.GenericRpcHandler:
        """For `server.add_generic_rpc_handlers`. Raises `ValueError` unless the operations are exactly the RPCs."""
        declared = {method.name: (method, access) for method, access in declared_access(service)}
        if unlike := declared.keys() ^ operations.keys():
            raise ValueError(f"{service.full_name}: RPCs without an operation, or the reverse: {sorted(unlike)}")
        handlers = {
            name: self._method_handler(method, access, operations[name]) for name, (method, access) in declared.items()
        }
        return grpc.method_handlers_generic_handler(service.full_name, handlers)

    async def finish(self) -> None:
        """Waits for writes under way, which the database bounds by its time-outs."""
        await asyncio.gather(*self._writes, return_exceptions=True)

    def _method_handler(
        self, method: MethodDescriptor, access: Access, operation: Any
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        action = _snake(method.name)
        codecs: dict[str, Any] = {
            "request_deserializer": GetMessageClass(method.input_type).FromString,
            "response_serializer": GetMessageClass(method.output_type).SerializeToString,
        }

        async def answer(request: Message, context: _Context) -> Message:
            check_storable(request)
            metadata = _texts(context)
            if isinstance(operation, Operation):
                return await self._transact(operation, access, method, request, metadata)
            caller = await self._admit(access, action, metadata)
            # As with other writes: a client that hangs up does not stop half-way what it has begun.
            try:
                return await self._shielded(operation(Invocation(caller, access, action, self._units), request))
            except HelixError as exc:
                await self._note_refusal(caller, access, action, exc)
                raise

        async def stream(request: Message, context: _Context) -> AsyncIterator[Message]:
            check_storable(request)
            caller = await self._admit(access, action, _texts(context))
            async for message in operation(Invocation(caller, access, action, self._units), request):
                yield message

        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(stream, **codecs)
        return grpc.unary_unary_rpc_method_handler(answer, **codecs)

    async def _transact(
        self,
        operation: Operation,
        access: Access,
        method: MethodDescriptor,
        request: Message,
        metadata: Mapping[str, str],
    ) -> Message:
        action = _snake(method.name)
        caller = await self._admit(access, action, metadata)
        try:
            if not access.writes:
                async with self._units.reading(caller, access, action) as unit:
                    answer = await operation.run(unit, request)
                    if not unit.authorised:
                        raise HelixError(ErrorKind.INTERNAL, f"{action} did not check the project that it is about.")
                    return answer
            prepared = await operation.prepare(request) if operation.prepare is not None else None
            return await self._shielded(self._write(operation, access, method, request, metadata, prepared))
        except HelixError as exc:
            await self._note_refusal(caller, access, action, exc)
            raise

    async def _write(
        self,
        operation: Operation,
        access: Access,
        method: MethodDescriptor,
        request: Message,
        metadata: Mapping[str, str],
        prepared: Any,
    ) -> Message:
        source = _source(metadata)
        nobody = Caller(CallerKind.ANONYMOUS, source=source)
        async with self._units.writing(nobody, access, _snake(method.name)) as unit:
            # Anew, within the transaction: a permission may have been taken away since the caller was let in.
            unit.caller = await self._authentication.identify(unit.connection, _credential(metadata), source)
            unit.caller.check(access)
            unit.prepared = prepared
            key = metadata.get(IDEMPOTENCY_KEY, "") if access.idempotent else ""
            # In another organisation the same words mean another request.
            said = f"{method.full_name}\0{unit.caller.organisation_id}\0".encode() + request.SerializeToString()
            fingerprint = hashlib.sha256(said).digest()
            if key and (earlier := await self._idempotency.find(unit, key, fingerprint)) is not None:
                unit.authorised = True
                message = GetMessageClass(method.output_type)()
                message.ParseFromString(earlier)
                return message
            answer = await operation.run(unit, request)
            if key:
                await self._idempotency.keep(unit, key, fingerprint, answer.SerializeToString())
            return answer

    async def _admit(self, access: Access, action: str, metadata: Mapping[str, str]) -> Caller:
        """Who calls, if the declaration lets them in. A caller who is known and refused is recorded."""
        source = _source(metadata)
        credential = "" if access.level is Level.PUBLIC else _credential(metadata)
        if not credential:
            caller = Caller(CallerKind.ANONYMOUS, source=source)
        else:
            caller = await self._units.identify(self._authentication, credential, source)
        try:
            caller.check(access)
        except HelixError as exc:
            await self._note_refusal(caller, access, action, exc)
            raise
        return caller

    async def _note_refusal(self, caller: Caller, access: Access, action: str, error: HelixError) -> None:
        if error.kind not in _REFUSALS or caller.kind is CallerKind.ANONYMOUS:
            return
        chain = INSTALLATION if access.level is Level.INSTALLATION else caller.organisation_id
        entry = AuditEntry(chain, caller, action, "", "", outcome=Outcome.DENIED, reason=error.code)
        async with self._units.writing(caller, replace(access, level=Level.SELF, permission=None), action) as unit:
            unit.entries.append(entry)

    async def _shielded(self, work: Any) -> Message:
        """Runs to the end also when the client hangs up: what was begun is finished, recorded and told."""
        task = asyncio.ensure_future(work)
        self._writes.add(task)
        task.add_done_callback(self._forget)
        answer: Message = await asyncio.shield(task)
        return answer

    def _forget(self, task: "asyncio.Task[Message]") -> None:
        self._writes.discard(task)
        if not task.cancelled():
            # Marks the exception as seen: the caller may have gone away.
            task.exception()


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _texts(context: _Context) -> dict[str, str]:
    """The call's metadata; a name that comes twice is as good as absent."""
    found: dict[str, str] = {}
    repeated = set()
    for name, value in context.invocation_metadata() or ():
        if isinstance(value, str):
            if name in found:
                repeated.add(name)
            found[name] = value
    for name in repeated:
        del found[name]
    return found


def _credential(metadata: Mapping[str, str]) -> str:
    scheme, _, credential = metadata.get(AUTHORIZATION, "").strip().partition(" ")
    return credential.strip() if scheme.lower() == "bearer" else ""


def _source(metadata: Mapping[str, str]) -> Source:
    return Source(
        metadata.get(CLIENT_ADDRESS, "")[:_MAX_METADATA],
        metadata.get(REQUEST_ID, "")[:_MAX_METADATA],
        unquote(metadata.get(CLIENT_SOFTWARE, ""))[:_MAX_METADATA],
    )
