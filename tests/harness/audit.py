"""Audit logs to look at: in a database, and as exports that were never in one."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from msgspec.structs import replace

from helixflow.auth.audit.checkpoints import Checkpoints
from helixflow.auth.audit.entry import AuditEntry
from helixflow.auth.audit.export import AuditExport
from helixflow.auth.audit.lines import FORMAT, VERSION, Checkpoint, End, Header, header_hash, render, signature_of
from helixflow.auth.audit.operations import audit_operations
from helixflow.auth.audit.record import NO_HASH, Record, hash_of
from helixflow.auth.audit.signatures import SigningKey, key_id, public_der, public_pem
from helixflow.auth.caller import Caller, CallerKind, Source
from helixflow.auth.changes import ChangeFeed
from helixflow.auth.dispatch import Invocation, Operation
from helixflow.auth.sealing import Sealer
from helixflow.auth.unit import Units
from helixflow.core.clock import FakeClock
from helixflow.core.permissions import Permission
from helixflow.rpc.access import Access, Level
from helixflow.rpc.generated.auth_v1 import admin_pb2 as pb
from helixflow.storage.engine import Database

ORGANISATION = "org_1"
ALICE = Caller(
    CallerKind.ACCOUNT,
    "user_alice",
    "Alice",
    ORGANISATION,
    source=Source("203.0.113.7", "req_1", "curl/8"),
)
_READ = Access(Level.ORGANISATION, Permission.AUDIT_READ, False, False)
_EXPORT = Access(Level.ORGANISATION, Permission.AUDIT_EXPORT, True, False)


class AuditLog:
    """What the auth service does with the log, on a database."""

    def __init__(self, database: Database, *, clock: FakeClock | None = None) -> None:
        self.database = database
        self.clock = clock or FakeClock()
        self.units = Units(database, self.clock, ChangeFeed(database, self.clock))
        self.checkpoints = Checkpoints(database, Sealer(bytes(range(32))))

    @property
    def now(self) -> int:
        return int(self.clock.now())

    async def add(self, *target_ids: str, caller: Caller = ALICE, organisation_id: str = ORGANISATION) -> None:
        """One record for each, in one transaction."""
        access = Access(Level.SELF, None, True, False)
        async with self.units.writing(caller, access, "create_project") as unit:
            for target_id in target_ids:
                unit.entries.append(
                    AuditEntry(organisation_id, caller, "create_project", "project", target_id, None, {"name": "Förde"})
                )

    async def export(self, caller: Caller = ALICE, **request: Any) -> list[bytes]:
        return b"".join(await self.export_messages(caller, **request)).splitlines(keepends=True)

    async def export_messages(self, caller: Caller = ALICE, **request: Any) -> list[bytes]:
        return [message async for message in self.stream_export(caller, **request)]

    async def stream_export(self, caller: Caller = ALICE, **request: Any) -> AsyncIterator[bytes]:
        invocation = Invocation(caller, _EXPORT, "export_audit_log", self.units)
        async for message in AuditExport(self.checkpoints)(invocation, pb.ExportAuditLogRequest(**request)):
            yield message.lines

    async def list_records(self, caller: Caller = ALICE, **request: Any) -> pb.ListAuditRecordsResponse:
        operation = audit_operations(self.checkpoints)["ListAuditRecords"]
        assert isinstance(operation, Operation)
        async with self.units.reading(caller, _READ, "list_audit_records") as unit:
            answer = await operation.run(unit, pb.ListAuditRecordsRequest(**request))
        assert isinstance(answer, pb.ListAuditRecordsResponse)
        return answer


def new_key() -> SigningKey:
    private = ec.generate_private_key(ec.SECP256R1())
    return SigningKey(key_id(private.public_key()), private)


def pem_of(key: SigningKey) -> str:
    return public_pem(public_der(key.private.public_key()))


def build_records(count: int, *, after: int = 0, after_hash: bytes = NO_HASH, **fields: Any) -> list[Record]:
    records = []
    for sequence in range(after + 1, after + count + 1):
        record = Record(
            **{
                "organisation_id": ORGANISATION,
                "sequence": sequence,
                "at": 1_700_000_000 + sequence,
                "actor_kind": "account",
                "actor_id": "user_alice",
                "actor_name": "Alice \U0001f511 \x7f\u2028",
                "action": "create_project",
                "outcome": "done",
                "reason": "",
                "target_kind": "project",
                "target_id": f"proj_{sequence}",
                "before": "",
                "after": '{"name":"F\\u0001\\"örde"}',
                "address": "203.0.113.7",
                "request_id": "req_1",
                "previous_hash": after_hash.hex(),
                **fields,
            }
        )
        after_hash = hash_of(record)
        records.append(replace(record, hash=after_hash.hex()))
    return records


def build_export(records: Sequence[Record], key: SigningKey, *, checkpoints: Sequence[int] = ()) -> list[bytes]:
    """The lines of an export of `records`, the first of a chain, with checkpoints after those of these numbers."""
    header = Header(FORMAT, VERSION, ORGANISATION, 0, 0, 1_700_000_900, 0, NO_HASH.hex(), {key.kid: pem_of(key)})
    lines = [render(header)]
    for record in records:
        lines.append(render(record))
        if record.sequence in checkpoints:
            checkpoint = Checkpoint(ORGANISATION, record.sequence, record.hash, 1_700_000_800, key.kid)
            lines.append(render(replace(checkpoint, signature=signature_of(checkpoint, key).hex())))
    last, last_hash = (records[-1].sequence, records[-1].hash) if records else (0, NO_HASH.hex())
    signed = len(lines) - 1 - len(records)
    end = End(ORGANISATION, last, last_hash, len(records), signed, header_hash(header), 1_700_000_901, key.kid)
    return [*lines, render(replace(end, signature=signature_of(end, key).hex()))]
