"""From RPCs to operations: who calls, whether they may, in which transaction, and what is remembered of it.

Every RPC of a service must have an operation, and declares in its proto who may call it: what is missing stops the
start.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from helixflow.auth.audit.entry import INSTALLATION, AuditEntry, Outcome
from helixflow.auth.audit.refusals import Refusals
from helixflow.auth.audit.targets import Targets
from helixflow.auth.authentication import Authentication
from helixflow.auth.caller import Caller, CallerKind, CallerRefused
from helixflow.auth.idempotency import Idempotency
from helixflow.auth.lookups import Lookups
from helixflow.auth.metadata import credential_of, source_of, texts_of
from helixflow.auth.texts import check_storable
from helixflow.auth.unit import Unit, Units
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.access import IDEMPOTENCY_KEY, Access, Level, declared_access

_Context = grpc.aio.ServicerContext[Any, Any]
Run = Callable[[Unit, Any], Awaitable[Message]]
Prepare = Callable[[Any], Awaitable[Any]]
_REFUSALS: Final = (ErrorKind.PERMISSION_DENIED, ErrorKind.NOT_FOUND)


@dataclass(frozen=True, slots=True)
class Operation:
    """`run` does it within a transaction. `prepare` does first what takes long and needs none (hashing a password), for
    callers that would be let in; what it gives becomes `Unit.prepared`.
    """

    run: Run
    prepare: Prepare | None = None


@dataclass(frozen=True, slots=True)
class _Rpc:
    method: MethodDescriptor
    access: Access
    action: str
    targets: Targets


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

    @property
    def lookups(self) -> Lookups:
        """For what anybody may ask: takes less from others than a unit, and nobody's turn to write."""
        return self.units.lookups

    @property
    def now(self) -> int:
        return self.units.now


class Conversation(Protocol):
    """An operation that makes its own transactions: between them it does what takes long."""

    def __call__(self, invocation: Invocation, request: Any, /) -> Awaitable[Message]: ...


class Flow(Protocol):
    """An operation that answers with a stream."""

    def __call__(self, invocation: Invocation, request: Any, /) -> AsyncIterator[Message]: ...


class Dispatcher:
    """Serves operations. Errors are `HelixError`s; the server's interceptor renders them.

    What a known caller is refused (PERMISSION_DENIED, NOT_FOUND: that may be somebody else's) is noted in `refusals`.
    """

    def __init__(
        self, units: Units, authentication: Authentication, idempotency: Idempotency, refusals: Refusals
    ) -> None:
        self._units = units
        self._authentication = authentication
        self._idempotency = idempotency
        self._refusals = refusals
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
        rpc = _Rpc(method, access, action, Targets(method, action))
        codecs: dict[str, Any] = {
            "request_deserializer": GetMessageClass(method.input_type).FromString,
            "response_serializer": GetMessageClass(method.output_type).SerializeToString,
        }

        async def answer(request: Message, context: _Context) -> Message:
            check_storable(request)
            metadata = texts_of(context)
            caller = await self._admit(rpc, request, metadata)
            if isinstance(operation, Operation):
                return await self._transact(operation, rpc, caller, request, metadata)
            # As with other writes: a client that hangs up does not stop half-way what it has begun.
            work = operation(self._invocation(rpc, caller), request)
            return await self._shielded(self._noted(rpc, caller, request, work))

        async def stream(request: Message, context: _Context) -> AsyncIterator[Message]:
            check_storable(request)
            caller = await self._admit(rpc, request, texts_of(context))
            try:
                async for message in operation(self._invocation(rpc, caller), request):
                    yield message
            except HelixError as exc:
                self._note_refusal(rpc, caller, request, exc)
                raise

        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(stream, **codecs)
        return grpc.unary_unary_rpc_method_handler(answer, **codecs)

    def _invocation(self, rpc: _Rpc, caller: Caller) -> Invocation:
        return Invocation(caller, rpc.access, rpc.action, self._units)

    async def _transact(
        self, operation: Operation, rpc: _Rpc, caller: Caller, request: Message, metadata: Mapping[str, str]
    ) -> Message:
        if not rpc.access.writes:
            return await self._noted(rpc, caller, request, self._read(operation, rpc, caller, request))
        prepared = await operation.prepare(request) if operation.prepare is not None else None
        work = self._write(operation, rpc, request, metadata, prepared)
        return await self._shielded(self._noted(rpc, caller, request, work))

    async def _read(self, operation: Operation, rpc: _Rpc, caller: Caller, request: Message) -> Message:
        async with self._units.reading(caller, rpc.access, rpc.action) as unit:
            answer = await operation.run(unit, request)
            if not unit.authorised:
                raise HelixError(ErrorKind.INTERNAL, f"{rpc.action} did not check the project that it is about.")
            return answer

    async def _write(
        self, operation: Operation, rpc: _Rpc, request: Message, metadata: Mapping[str, str], prepared: Any
    ) -> Message:
        source = source_of(metadata)
        nobody = Caller(CallerKind.ANONYMOUS, source=source)
        async with self._units.writing(nobody, rpc.access, rpc.action) as unit:
            # Anew, within the transaction: a permission may have been taken away since the caller was let in.
            unit.caller = await self._authentication.identify(unit.connection, credential_of(metadata), source)
            unit.caller.check(rpc.access)
            unit.prepared = prepared
            key = metadata.get(IDEMPOTENCY_KEY, "") if rpc.access.idempotent else ""
            if not key:
                return await operation.run(unit, request)
            said = f"{rpc.method.full_name}\0".encode() + request.SerializeToString()
            if (earlier := await self._idempotency.find(unit, key, said)) is not None:
                message = GetMessageClass(rpc.method.output_type)()
                message.ParseFromString(earlier)
                return message
            answer = await operation.run(unit, request)
            await self._idempotency.keep(unit, key, said, answer.SerializeToString())
            return answer

    async def _admit(self, rpc: _Rpc, request: Message, metadata: Mapping[str, str]) -> Caller:
        """Who calls, if the declaration lets them in."""
        source = source_of(metadata)
        credential = "" if rpc.access.level is Level.PUBLIC else credential_of(metadata)
        caller = Caller(CallerKind.ANONYMOUS, source=source)
        try:
            if credential:
                caller = await self._units.identify(self._authentication, credential, source)
            caller.check(rpc.access)
        except HelixError as exc:
            refused = exc.caller if isinstance(exc, CallerRefused) else caller
            self._note_refusal(rpc, refused, request, exc)
            raise
        return caller

    async def _noted(self, rpc: _Rpc, caller: Caller, request: Message, work: Awaitable[Message]) -> Message:
        """Belongs within what is shielded: who hangs up is refused all the same."""
        try:
            return await work
        except HelixError as exc:
            self._note_refusal(rpc, caller, request, exc)
            raise

    def _note_refusal(self, rpc: _Rpc, caller: Caller, request: Message, error: HelixError) -> None:
        if error.kind not in _REFUSALS or caller.kind is CallerKind.ANONYMOUS:
            return
        chain = INSTALLATION if rpc.access.level is Level.INSTALLATION else caller.organisation_id
        target = rpc.targets.find(request)
        self._refusals.note(AuditEntry(chain, caller, rpc.action, *target, outcome=Outcome.DENIED, reason=error.code))

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
