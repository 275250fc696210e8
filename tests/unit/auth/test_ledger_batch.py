"""Rows as they come from journals: what the ledger takes, and what they add up to."""

from typing import Any

import msgspec
import pytest

from helixflow.auth.ledger.batch import MAX_ROWS, LedgerRow, decode_batch
from helixflow.auth.ledger.partitions import Month
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.rows import COLUMNS, RequestRow, encode_rows
from helixflow.storage.schema import requests
from tests.harness.ledger import make_row


def refusal(data: bytes) -> str:
    with pytest.raises(HelixError) as caught:
        decode_batch(data)
    assert (caught.value.kind, caught.value.param) == (ErrorKind.INVALID_VALUE, "rows")
    return caught.value.message


def encode(*fields: Any) -> bytes:
    return msgspec.msgpack.encode([(1, fields)])


def test_rows_are_those_that_shippers_send_and_the_table_holds() -> None:
    fields = {field.name: field for field in msgspec.structs.fields(RequestRow)}
    assert LedgerRow.__struct_fields__ == COLUMNS == tuple(requests.columns.keys())
    for field in msgspec.structs.fields(LedgerRow):
        assert field.default == fields[field.name].default
    row = make_row(1, tags={"a": "b"})
    assert decode_batch(encode_rows([(1, row)])).values == [msgspec.structs.astuple(row)]


def test_rows_of_an_older_version_are_taken_and_those_of_a_newer_one_refused() -> None:
    fields = msgspec.structs.astuple(make_row(1))
    (row,) = decode_batch(encode(*fields[:-2])).rows
    assert (row.tags, row.explanation) == ("", "")
    assert "at most length 28, got 29" in refusal(encode(*fields, "new"))


def test_nothing_is_a_batch_too() -> None:
    for data in (b"", encode_rows([])):
        batch = decode_batch(data)
        assert (len(batch), batch.hourly, batch.daily, batch.tagged) == (0, [], [], [])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"call_id": "a" * 31}, "length"),
        ({"call_id": "G" * 32}, "32 hexadecimal digits"),
        ({"organisation_id": "o" * 65}, "length"),
        ({"model": "m" * 257}, "length"),
        ({"model": "m\0"}, "NUL in model"),
        ({"tags": '{"a":1}'}, "Expected `str`"),
        ({"tags": "[]"}, "Expected `object`"),
        ({"tags": "{"}, "truncated"),
        ({"cost": -1}, ">= 0"),
        ({"cost": 2**53 + 1}, "<= 9007199254740992"),
        ({"cost": 1.5}, "Expected `int`"),
        ({"queue_ms": -2}, ">= -1"),
        ({"stream": 1}, "Expected `bool`"),
    ],
)
def test_what_no_database_could_keep_is_refused_with_the_reason(changes: dict[str, Any], told: str) -> None:
    assert told in refusal(encode_rows([(1, make_row(1)), (2, msgspec.structs.replace(make_row(2), **changes))]))


def test_batches_are_bounded_and_in_the_order_of_the_journal() -> None:
    rows = [(number, make_row(number)) for number in range(MAX_ROWS + 1)]
    assert len(decode_batch(encode_rows(rows[1:]))) == MAX_ROWS
    assert "length" in refusal(encode_rows(rows))
    for positions in ((2, 1), (1, 1)):
        assert "must grow" in refusal(encode_rows([(position, make_row(position)) for position in positions]))


def test_what_is_known_is_left_out_of_rows_and_sums() -> None:
    batch = decode_batch(encode_rows([(10 * number, make_row(number)) for number in range(1, 6)]))
    assert batch.after(9) is batch
    rest = batch.after(20)
    assert [row.request_id for row in rest.rows] == ["req_3", "req_4", "req_5"]
    assert rest.daily[0][8:] == (3, 0, 21, 6, 9, 3, 33)
    assert len(batch.after(50)) == 0
    known = {(row.call_id, row.admitted_at_ms) for row in batch.rows[:4]}
    assert [row.request_id for row in batch.without(known).rows] == ["req_5"]
    assert batch.without(known).hourly[0][8:] == (1, 0, 7, 2, 3, 1, 11)


def test_months_begin_at_midnight_utc_and_follow_each_other() -> None:
    december = Month.at(1_798_761_599_999)
    assert (december, december.next) == (Month(2026, 12), Month(2027, 1))
    assert Month.at(1_798_761_600_000) == december.next
    assert december.next.begin_ms == 1_798_761_600_000
    assert Month.of_partition(december.partition) == december
    assert Month.of_partition("requests_default") is None
