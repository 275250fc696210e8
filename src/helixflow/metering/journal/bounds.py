"""Records made to fit into what is kept free for them."""

from collections.abc import Callable
from typing import Final

import msgspec

from helixflow.metering.journal.frames import OVERHEAD
from helixflow.metering.journal.records import MAX_SETTLEMENT_BYTES, Settled, SideCharge, encode_record

_MAX_PAYLOAD_BYTES: Final = MAX_SETTLEMENT_BYTES - OVERHEAD
_ERROR_CHARACTERS: Final = 200
_ATTEMPT_ERROR_CHARACTERS: Final = 60
_NAME_CHARACTERS: Final = 60


def encode_settlement(record: Settled) -> bytes:
    """The payload of a settlement, at most MAX_SETTLEMENT_BYTES with its frame.

    What explains is cut before what counts: the texts of errors, then the oldest attempts, then long names. Never
    raises for what callers and upstreams may say.
    """
    try:
        payload = encode_record(record)
    except UnicodeEncodeError:  # lone surrogates, from an upstream's JSON
        record = _printable(record)
        payload = encode_record(record)
    if len(payload) <= _MAX_PAYLOAD_BYTES:
        return payload
    attempts = tuple(
        (_cut(name, _NAME_CHARACTERS), _cut(error, _ATTEMPT_ERROR_CHARACTERS)) for name, error in record.attempts
    )
    record = msgspec.structs.replace(record, error=_cut(record.error, _ERROR_CHARACTERS), attempts=attempts)
    while len(payload := encode_record(record)) > _MAX_PAYLOAD_BYTES and record.attempts:
        record = msgspec.structs.replace(record, attempts=record.attempts[max(1, len(record.attempts) // 4) :])
    if len(payload) > _MAX_PAYLOAD_BYTES:
        payload = encode_record(
            msgspec.structs.replace(
                record,
                deployment=_cut(record.deployment, _NAME_CHARACTERS),
                outcome=_cut(record.outcome, _NAME_CHARACTERS),
                price_version=_cut(record.price_version, _NAME_CHARACTERS),
                side=_named(record.side, lambda name: _cut(name, _NAME_CHARACTERS)),
            )
        )
    return payload


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else f"{text[: characters - 1]}…"


def _printable(record: Settled) -> Settled:
    attempts = tuple((_replace(name), _replace(error)) for name, error in record.attempts)
    return msgspec.structs.replace(
        record,
        deployment=_replace(record.deployment),
        error=_replace(record.error),
        attempts=attempts,
        side=_named(record.side, _replace),
    )


def _named(side: tuple[SideCharge, ...], change: Callable[[str], str]) -> tuple[SideCharge, ...]:
    return tuple(msgspec.structs.replace(one, deployment=change(one.deployment)) for one in side)


def _replace(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")
