"""What calls cost, against decimal arithmetic."""

from decimal import ROUND_HALF_UP, Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.journal.records import Tokens
from helixflow.metering.money import MAX_NANODOLLARS, NANOS, format_dollars, parse_dollars
from helixflow.metering.prices import Price, Tier, decode_price, encode_price

amounts = st.one_of(st.just(0), st.integers(0, 100_000 * NANOS))
counts = st.one_of(st.integers(0, 3), st.integers(0, 2_000_000))
durations = st.integers(-1, 600_000)


@st.composite
def prices(draw: st.DrawFn) -> Price:
    starts = sorted(draw(st.sets(st.one_of(st.integers(1, 5), st.integers(1, 1_000_000)), max_size=4)))
    return Price(
        source="set",
        input=draw(amounts),
        cached_input=draw(amounts),
        output=draw(amounts),
        request=draw(amounts),
        engine_second=draw(amounts),
        tiers=tuple(Tier(start, draw(amounts), draw(amounts), draw(amounts)) for start in starts),
    ).sealed()


@st.composite
def usages(draw: st.DrawFn) -> Tokens:
    prompt = draw(counts)
    return Tokens(prompt, draw(st.integers(0, prompt)), draw(counts), 0, True)


def in_decimals(price: Price, tokens: Tokens, engine_ms: int) -> int:
    """The definition, without regard for speed."""
    rates: Price | Tier = price
    for tier in price.tiers:
        if tokens.prompt >= tier.from_prompt_tokens:
            rates = tier
    million, thousand = Decimal(1_000_000), Decimal(1_000)
    cost = (
        Decimal(price.request)
        + Decimal(tokens.prompt - tokens.cached) * rates.input / million
        + Decimal(tokens.cached) * rates.cached_input / million
        + Decimal(tokens.completion) * rates.output / million
        + Decimal(max(engine_ms, 0)) * price.engine_second / thousand
    )
    return int(cost.to_integral_value(ROUND_HALF_UP))


@given(prices(), usages(), durations)
def test_a_call_costs_what_decimals_say_to_the_nanodollar(price: Price, tokens: Tokens, engine_ms: int) -> None:
    assert price.rate(tokens, engine_ms) == in_decimals(price, tokens, engine_ms)


@given(prices(), usages(), durations, counts, counts, st.integers(0, 60_000))
def test_nothing_that_uses_at_most_so_much_costs_more_than_the_bound(
    price: Price, tokens: Tokens, engine_ms: int, more_prompt: int, more_completion: int, more_ms: int
) -> None:
    cost = price.rate(tokens, engine_ms)
    assert cost <= price.bound(tokens.prompt, tokens.completion, engine_ms)
    assert cost <= price.bound(tokens.prompt + more_prompt, tokens.completion + more_completion, engine_ms + more_ms)


@given(prices(), st.integers(-5, 5), st.integers(-5, 20), st.integers(-5, 5), st.integers(-5, 5))
def test_figures_that_cannot_be_cost_nothing_and_no_more_than_the_bound(
    price: Price, prompt: int, cached: int, completion: int, engine_ms: int
) -> None:
    sane_prompt = max(prompt, 0)
    sane = Tokens(sane_prompt, min(max(cached, 0), sane_prompt), max(completion, 0))
    cost = price.rate(Tokens(prompt, cached, completion), engine_ms)
    assert cost == price.rate(sane, max(engine_ms, 0)) <= price.bound(prompt, completion, engine_ms)


@given(prices())
def test_a_price_is_read_as_it_was_written_and_its_version_tells_it_from_others(price: Price) -> None:
    assert decode_price(encode_price(price)) == price
    assert price.sealed() == price and len(price.version) == 16
    dearer = Price(source="set", input=price.input + 1, output=price.output).sealed()
    assert dearer.version != price.version
    elsewhere = Price(source="default", input=price.input + 1, output=price.output).sealed()
    assert elsewhere.version != dearer.version


def test_a_tier_is_for_all_tokens_of_the_request_and_reserves_only_where_it_can_be_reached() -> None:
    price = Price(input=NANOS, cached_input=NANOS, output=0, tiers=(Tier(100, 3 * NANOS, 2 * NANOS, NANOS),))
    assert price.rate(Tokens(99, 0, 7), 0) == 99_000 == price.bound(99, 7, 0)
    assert price.rate(Tokens(100, 10, 7), 0) == 90 * 3_000 + 10 * 2_000 + 7 * 1_000
    assert price.bound(100, 7, 0) == 307_000


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"input":-1}',
        b'{"input":1.5}',
        b'{"output":"1"}',
        b'{"tiers":[{"from_prompt_tokens":5,"input":1,"cached_input":1,"output":1},'
        b'{"from_prompt_tokens":5,"input":2,"cached_input":1,"output":1}]}',
    ],
)
def test_what_is_no_price_is_refused(body: bytes) -> None:
    with pytest.raises(HelixError) as caught:
        decode_price(body)
    assert caught.value.kind is ErrorKind.UPSTREAM_INVALID


@given(st.integers(0, MAX_NANODOLLARS))
def test_every_amount_is_read_back_from_what_is_shown(nanodollars: int) -> None:
    shown = format_dollars(nanodollars)
    assert parse_dollars(shown) == nanodollars == Decimal(shown) * NANOS
    assert format_dollars(-nanodollars) == (f"-{shown}" if nanodollars else shown)


@given(st.decimals(0, MAX_NANODOLLARS // NANOS, allow_nan=False, places=9))
def test_amounts_are_exact(amount: Decimal) -> None:
    assert parse_dollars(f"{amount:f}") == int(amount * NANOS)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-1",
        "+1",
        "1e3",
        "1.",
        ".5",
        "1.0000000001",
        "1,5",
        " 1",
        "1 ",
        "1\n",
        "١",
        "nan",
        "inf",
        "9000000.000000001",
    ],
)
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="amount"):
        parse_dollars(text)
