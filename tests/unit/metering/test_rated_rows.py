"""A row of the ledger shows all that its cost was made of, however its call ended."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from helixflow.metering.journal.records import Admitted, Progressed, Settled, SideCharge, Tokens
from helixflow.metering.prices import Price
from helixflow.metering.rows import Explanation, RequestRow
from helixflow.metering.shipping.joining import Joiner

counts = st.integers(0, 10_000)
PRICE = Price("", "set", 2_500_000_001, 300_000_007, 10_000_000_003, 17, 1_000_003).sealed()
ADMITTED = Admitted("c", 1_000, "r", "o", "p", "k", "", "m", "openai", "chat", True)


def rate_again(row: RequestRow) -> int:
    assert row.price_version == PRICE.version
    own = PRICE.rate(Tokens(row.prompt_tokens, row.cached_tokens, row.completion_tokens), row.engine_ms)
    side = msgspec.json.decode(row.explanation, type=Explanation).side
    return own + sum(PRICE.rate(charge.tokens, charge.engine_ms) for charge in side)


@given(counts, counts, counts, st.integers(-1, 60_000), st.booleans(), st.none() | counts)
def test_what_was_settled_and_what_was_interrupted_can_be_rated_again(
    prompt: int, cached: int, completion: int, engine_ms: int, interrupted: bool, lost: int | None
) -> None:
    tokens = Tokens(prompt, cached, completion, 0, True)
    cost = PRICE.rate(tokens, engine_ms)
    side: tuple[SideCharge, ...] = ()
    if lost is not None:
        side = (SideCharge("m/e-1", Tokens(lost), 30, PRICE.rate(Tokens(lost), 30), PRICE.version),)
        cost += side[0].cost
    progressed = Progressed("c", 1_500, "m/e-0", tokens, cost, PRICE.version, 40, engine_ms, side)
    settled = Settled("c", "m/e-0", 200, "completed", "", tokens, cost, PRICE.version, 0, 40, 700, engine_ms, (), side)
    joiner = Joiner("a" * 24)
    records = [(0, 100, ADMITTED), (100, 200, progressed)]
    rows = joiner.feed(records if interrupted else [*records, (200, 300, settled)]) + joiner.finish()
    ((_, row),) = rows
    assert row.outcome == ("interrupted" if interrupted else "completed")
    assert rate_again(row) == row.cost == cost
