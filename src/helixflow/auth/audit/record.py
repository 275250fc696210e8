"""A record of the audit log, and the hash that ties it to the one before.

The hash is SHA-256 of the record's canonical JSON: an object with all fields but `hash`, and `"type": "record"`; names
sorted, no white space, UTF-8, only integers and strings (RFC 8785). Hashes within it are hexadecimal, lower case.
docs/reference/audit-log.md is the description for people who verify a log without this code.
"""

import hashlib
import json
from typing import Any, Final

import msgspec

# What the first record of a chain goes on from.
NO_HASH: Final = bytes(32)


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="record"):
    """One act in its place: the fields of `AuditRecord` in proto/helixflow/auth/v1/admin.proto.

    `at` is seconds since the epoch. `before` and `after` are JSON text, which is hashed as it stands; '' for none.
    The hashes are hexadecimal.
    """

    organisation_id: str
    sequence: int
    at: int
    actor_kind: str
    actor_id: str
    actor_name: str
    action: str
    outcome: str
    reason: str
    target_kind: str
    target_id: str
    before: str
    after: str
    address: str
    request_id: str
    previous_hash: str
    hash: str = ""


def canonical(line: msgspec.Struct, without: str = "") -> bytes:
    """The canonical JSON of a record or another line of an export, without the field of that name.

    They hold integers below 2**53, text without lone surrogates, and objects of these.
    """
    fields: dict[str, Any] = msgspec.structs.asdict(line)
    fields.pop(without, None)
    fields["type"] = line.__struct_config__.tag
    return json.dumps(fields, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def hash_of(record: Record) -> bytes:
    """The 32 bytes under which the next record knows this one; what `record.hash` says does not matter."""
    return hashlib.sha256(canonical(record, without="hash")).digest()
