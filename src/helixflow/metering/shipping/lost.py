"""Rows of calls whose journal is gone."""

from typing import Final

from helixflow.metering.journal.records import Admitted, Tokens
from helixflow.metering.rows import RequestRow, make_row
from helixflow.metering.shipping.closing import LostCall

# Past all positions that other rows have.
LOST_BASE: Final = 1 << 60
LOST: Final = "lost"


def make_lost_row(call: LostCall, journal_id: str) -> RequestRow:
    """Charged what it had reserved; who it was for is known, not what for: model, user and tokens are empty."""
    admitted = Admitted(
        call.call_id,
        call.admitted_at_ms,
        "",
        call.organisation_id,
        call.project_id,
        call.key_id,
        "",
        "",
        "",
        "",
        False,
        reserved_cost=call.cost,
    )
    return make_row(
        admitted, Tokens(), journal_id=journal_id, deployment="", status=0, outcome=LOST, error=LOST, cost=call.cost
    )
