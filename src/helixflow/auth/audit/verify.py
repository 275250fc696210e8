"""Checks an exported audit log line by line, without a database, and names the first thing that is wrong.

Whatever the lines say, they are only compared: an export from elsewhere can be fed in.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import BinaryIO, Final

import msgspec
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

from helixflow.auth.audit.lines import FORMAT, VERSION, Checkpoint, End, Header, Line, Signed, header_hash, signed_bytes
from helixflow.auth.audit.record import Record, canonical, hash_of
from helixflow.auth.audit.signatures import is_signed, parse_public_keys

# Far more than the longest record has.
MAX_LINE: Final = 2**20
_decoder: Final = msgspec.json.Decoder(Line)


class Broken(Exception):
    """Something is wrong with this line (counted from 1), which holds or should hold this record, None for another."""

    def __init__(self, line: int, sequence: int | None, problem: str, expected: int | None = None) -> None:
        self.line = line
        self.sequence = sequence
        self.problem = problem
        # The record that should have been on the line.
        self.expected = expected
        super().__init__(f"line {line}{f', record {sequence}' if sequence is not None else ''}: {problem}")


@dataclass(frozen=True, slots=True)
class Verified:
    """An export in which everything holds. Times are seconds since the epoch, `kids` are the keys that signed it."""

    organisation_id: str
    first: int
    last: int
    head_hash: str
    records: int
    checkpoints: int
    exported_at: int
    kids: frozenset[str]


def verify(stream: BinaryIO, pinned: Mapping[str, EllipticCurvePublicKey] | None = None) -> Verified:
    """Reads an export to its end, one line at a time. Raises `Broken`, and `OSError` of the stream.

    Only the keys `pinned` count; without them those that the export itself brings, which proves that nothing was
    changed since it was signed, but not by whom.
    """
    verifier = Verifier(pinned)
    try:
        while line := stream.readline(MAX_LINE + 1):
            verifier.feed(line)
        return verifier.finish()
    except Broken as exc:
        if exc.expected is not None and (found := _find(stream, exc.line, exc.expected)):
            raise Broken(exc.line, exc.expected, f"out of order: it comes later, on line {found}") from None
        raise


class Verifier:
    """Takes the lines of an export one by one: `feed` each with its line feed, then `finish`. Both raise `Broken`."""

    def __init__(self, pinned: Mapping[str, EllipticCurvePublicKey] | None = None) -> None:
        self._pinned = pinned
        self._line = 0
        self._state: _State | None = None

    def feed(self, line: bytes) -> None:
        self._line += 1
        if self._state is not None and self._state.ended:
            raise Broken(self._line, None, "something follows after the end")
        parsed = self._parse(line)
        state = self._state
        match parsed:
            case Header() if state is None:
                self._state = self._begin(parsed)
            case Header():
                raise Broken(self._line, None, "a second header")
            case _ if state is None:
                raise Broken(self._line, None, "an export begins with a header, which is missing")
            case Record():
                self._check_record(state, parsed)
            case Checkpoint():
                self._check_checkpoint(state, parsed)
            case End():
                self._check_end(state, parsed)

    def finish(self) -> Verified:
        state = self._state
        if state is None:
            raise Broken(1, None, "the file is empty")
        if not state.ended:
            problem = "the end is missing: the file was cut off, or the export broke off"
            raise Broken(self._line + 1, state.sequence + 1, problem)
        return Verified(
            state.header.organisation_id,
            state.header.after + 1,
            state.sequence,
            state.hash,
            state.records,
            state.checkpoints,
            state.header.exported_at,
            frozenset(state.kids),
        )

    def _parse(self, line: bytes) -> Line:
        if len(line) > MAX_LINE:
            raise Broken(self._line, None, f"longer than {MAX_LINE} bytes")
        expected = self._state.sequence + 1 if self._state is not None else None
        if not line.endswith(b"\n"):
            raise Broken(self._line, expected, "the line is cut off")
        try:
            parsed: Line = _decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise Broken(self._line, expected, "not a line of an audit log: it was changed, or is no JSON") from exc
        try:
            same = canonical(parsed) + b"\n" == line
        except UnicodeEncodeError:
            same = False  # a lone surrogate: we write none
        if not same:
            sequence = parsed.sequence if isinstance(parsed, Record) else None
            raise Broken(self._line, sequence, "changed: not written as an export writes it")
        return parsed

    def _begin(self, header: Header) -> "_State":
        if header.format != FORMAT or header.version != VERSION:
            raise Broken(self._line, None, f"format {header.format!r}, version {header.version}, is not known here")
        keys: dict[str, EllipticCurvePublicKey] = {}
        for kid, pem in header.keys.items():
            try:
                own = parse_public_keys(pem.encode())
            except ValueError as exc:
                raise Broken(self._line, None, f"the key {kid!r} cannot be read") from exc
            if list(own) != [kid]:
                raise Broken(self._line, None, f"the key {kid!r} is another one than its id says")
            keys |= own
        trusted = keys if self._pinned is None else self._pinned
        return _State(header, trusted, header.after, header.after_hash)

    def _check_record(self, state: "_State", record: Record) -> None:
        expected = state.sequence + 1
        if record.organisation_id != state.header.organisation_id:
            raise Broken(self._line, record.sequence, "a record of another organisation")
        if hash_of(record).hex() != record.hash:
            raise Broken(self._line, record.sequence, "its hash does not match: a field was changed")
        if record.sequence > expected:
            missing = f"{expected}" if record.sequence == expected + 1 else f"{expected} to {record.sequence - 1}"
            problem = f"missing: {missing}; record {record.sequence} follows instead"
            raise Broken(self._line, expected, problem, expected)
        if record.sequence < expected:
            raise Broken(self._line, record.sequence, "a duplicate, or out of order")
        if record.previous_hash != state.hash:
            before = record.sequence - 1
            problem = f"does not follow from what comes before: record {before} or this one was changed and hashed anew"
            raise Broken(self._line, record.sequence, problem)
        state.sequence = record.sequence
        state.hash = record.hash
        state.records += 1

    def _check_checkpoint(self, state: "_State", checkpoint: Checkpoint) -> None:
        self._check_signature(state, checkpoint)
        self._check_place(state, checkpoint, "a checkpoint")
        if checkpoint.sequence <= state.signed:
            raise Broken(self._line, checkpoint.sequence, "a duplicate of a checkpoint")
        state.signed = checkpoint.sequence
        state.checkpoints += 1

    def _check_end(self, state: "_State", end: End) -> None:
        self._check_signature(state, end)
        if end.header_hash != header_hash(state.header):
            raise Broken(1, None, "the header was changed: the end is signed for another one")
        self._check_place(state, end, "the end")
        if (end.records, end.checkpoints) != (state.records, state.checkpoints):
            problem = (
                f"{end.records} records and {end.checkpoints} checkpoints were exported, "
                f"{state.records} and {state.checkpoints} are here"
            )
            raise Broken(self._line, None, problem)
        state.ended = True

    def _check_place(self, state: "_State", line: Signed, what: str) -> None:
        if line.sequence > state.sequence:
            missing = state.sequence + 1
            problem = f"missing: {what} is signed for record {line.sequence}"
            raise Broken(self._line, missing, problem, missing)
        if line.sequence < state.sequence:
            raise Broken(self._line, line.sequence, f"{what} is out of order, or records were added before it")
        if line.hash != state.hash:
            problem = f"not what {what} was signed for: it was changed and hashed anew, or one before it"
            raise Broken(self._line, line.sequence, problem)

    def _check_signature(self, state: "_State", line: Signed) -> None:
        if line.organisation_id != state.header.organisation_id:
            raise Broken(self._line, None, "signed for another organisation")
        key = state.keys.get(line.kid)
        if key is None:
            raise Broken(self._line, None, f"signed with an unknown key ({line.kid})")
        try:
            signature = bytes.fromhex(line.signature)
        except ValueError:
            signature = b""
        if signature.hex() != line.signature or not is_signed(key, signed_bytes(line), signature):
            raise Broken(self._line, None, "the signature does not match: the line was changed")
        state.kids.add(line.kid)


@dataclass(slots=True)
class _State:
    """How far an export has been checked."""

    header: Header
    keys: Mapping[str, EllipticCurvePublicKey]
    # The last record, and its hash.
    sequence: int
    hash: str
    # The last record that a checkpoint covered.
    signed: int = -1
    records: int = 0
    checkpoints: int = 0
    ended: bool = False
    kids: set[str] = field(default_factory=set)


def _find(stream: BinaryIO, line: int, sequence: int) -> int:
    """The line further down that holds this record; 0 for none."""
    while text := stream.readline(MAX_LINE + 1):
        line += 1
        try:
            parsed = _decoder.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
        if isinstance(parsed, Record) and parsed.sequence == sequence:
            return line
    return 0
