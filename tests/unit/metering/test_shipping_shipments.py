from helixflow.metering.journal.records import Admitted, Tokens
from helixflow.metering.rows import Positioned, decode_rows, make_row
from helixflow.metering.shipping.shipments import MAX_BYTES, MAX_ROWS, pack

JOURNAL = "0123456789abcdef01234567"


def rows(count: int, tag: str = "") -> list[Positioned]:
    made = []
    for number in range(count):
        admitted = Admitted(
            f"{number:032x}", 1, "r", "o", "p", "k", "u", "m", "openai", "chat", False, {"t": tag} if tag else None
        )
        row = make_row(admitted, Tokens(), journal_id=JOURNAL, deployment="d", status=200, outcome="completed")
        made.append((10 * (number + 1), row))
    return made


def test_nothing_to_ship_is_one_empty_shipment_that_moves_the_position() -> None:
    (shipment,) = pack(JOURNAL, [], 77, quarantined=2)
    assert (shipment.position, shipment.rows, shipment.closes, shipment.quarantined) == (77, b"", False, 2)


def test_many_rows_are_split_and_only_the_last_shipment_closes_and_reports() -> None:
    all_rows = rows(MAX_ROWS + 1)
    shipments = list(pack(JOURNAL, all_rows, 99_999, closes=True, quarantined=3))
    assert [row for one in shipments for row in decode_rows(one.rows)] == all_rows
    assert all(one.count <= MAX_ROWS and one.journal_id == JOURNAL for one in shipments)
    *others, last = shipments
    assert (last.position, last.closes, last.quarantined) == (99_999, True, 3)
    for other in others:
        assert (other.position, other.closes, other.quarantined) == (decode_rows(other.rows)[-1][0], False, 0)


def test_large_rows_are_split_by_their_size() -> None:
    all_rows = rows(600, tag="x" * 12_000)
    shipments = list(pack(JOURNAL, all_rows, 6000))
    assert len(shipments) > 1
    assert all(len(one.rows) <= MAX_BYTES for one in shipments)
    assert [row for one in shipments for row in decode_rows(one.rows)] == all_rows
