"""The lines of an export: a header, records with checkpoints after those that they cover, an end.

Each is canonical JSON (see `record`) and a line feed, byte for byte: what differs has been changed. Checkpoint and end
are signed over their own line without `signature`. docs/reference/audit-log.md describes the format.
"""

import hashlib
from typing import Final

import msgspec

from helixflow.auth.audit.record import Record, canonical
from helixflow.auth.audit.signatures import SigningKey

FORMAT: Final = "helixflow-audit-log"
VERSION: Final = 1


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="header"):
    """What follows: the records after number `after`, whose hash is `after_hash` (64 zeros for the very beginning).

    `since` and `until` are what was asked for, seconds since the epoch, 0 for all. `keys` are public keys in PEM, by
    key id.
    """

    format: str
    version: int
    organisation_id: str
    since: int
    until: int
    exported_at: int
    after: int
    after_hash: str
    keys: dict[str, str]


class Checkpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="checkpoint"):
    """At that time the record of that number had that hash, and so had all before it theirs."""

    organisation_id: str
    sequence: int
    hash: str
    at: int
    kid: str
    signature: str = ""


class End(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="end"):
    """Nothing is missing: the last record, how many lines there were of each kind, the SHA-256 of the header."""

    organisation_id: str
    sequence: int
    hash: str
    records: int
    checkpoints: int
    header_hash: str
    at: int
    kid: str
    signature: str = ""


Line = Header | Record | Checkpoint | End
Signed = Checkpoint | End


def signed_bytes(line: Signed) -> bytes:
    """What the signature of a line is over."""
    return canonical(line, without="signature")


def signature_of(line: Signed, key: SigningKey) -> bytes:
    return key.sign(signed_bytes(line))


def header_hash(header: Header) -> str:
    """As the end has it: SHA-256, hexadecimal."""
    return hashlib.sha256(canonical(header)).hexdigest()


def render(line: Line) -> bytes:
    """The line with its line feed."""
    return canonical(line) + b"\n"
