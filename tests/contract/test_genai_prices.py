"""The prices of known models are the library's own: what it says a call costs, to the nanodollar."""

import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import pytest
from genai_prices import Usage, __version__
from genai_prices.data_snapshot import get_snapshot
from genai_prices.types import (
    ClauseEquals,
    ConditionalPrice,
    ModelInfo,
    ModelPrice,
    Provider,
    StartDateConstraint,
    TieredPrices,
    TimeOfDateConstraint,
)
from genai_prices.types import Tier as LibraryTier

import helixflow
from helixflow.auth.price_sources import KnownModel, KnownPrices
from helixflow.metering.journal.records import Tokens
from helixflow.metering.money import NANOS
from helixflow.metering.prices import Price, Tier

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
# Prompt tokens, cached ones of them, completion tokens.
USAGES = (
    *((0, 0, 0), (1, 0, 1), (1_000, 0, 500), (127_999, 1_000, 77), (200_000, 0, 9)),
    *((200_001, 150_000, 9), (272_001, 3, 12_345), (600_000, 599_999, 1)),
)


def priced() -> Iterator[tuple[Provider, ModelInfo]]:
    """All models that the library knows, with their providers."""
    return ((provider, model) for provider in get_snapshot().providers for model in provider.models)


def milliseconds(moment: datetime) -> int:
    return int(moment.timestamp()) * 1000


def by_library(provider: Provider, model: ModelInfo, usage: tuple[int, int, int], at: datetime) -> Decimal:
    prompt, cached, completion = usage
    asked = Usage(input_tokens=prompt, cache_read_tokens=cached, output_tokens=completion)
    return model.calc_price(asked, provider, genai_request_timestamp=at).total_price * NANOS


def decimals(value: Any) -> Iterator[Decimal]:
    if isinstance(value, TieredPrices):
        yield value.base
        yield from (tier.price for tier in value.tiers)
    elif isinstance(value, Decimal):
        yield value


def is_exact(prices: ModelPrice) -> bool:
    """A few rates were floats once, and have seventeen decimals."""
    return all(rate * NANOS % 1 == 0 for value in vars(prices).values() for rate in decimals(value))


def test_every_model_that_can_be_expressed_costs_what_the_library_says() -> None:
    compared = 0
    for provider, model in priced():
        price = KnownModel("x", model).price_at(milliseconds(NOW))
        if price is None:
            continue
        exact = is_exact(model.get_prices(NOW))
        for usage in USAGES:
            wanted = by_library(provider, model, usage, NOW)
            rated = price.rate(Tokens(*usage), 0)
            if exact:
                assert rated == wanted.to_integral_value(ROUND_HALF_UP), (provider.id, model.id, usage)
            else:
                assert abs(rated - wanted) <= 1, (provider.id, model.id, usage)
        compared += 1
    # All but those for sound, pages and the like, and those that are free or of unknown price.
    assert compared > 2_000


def test_what_has_no_rate_for_tokens_is_not_expressed() -> None:
    for _, model in priced():
        tokens = {"input_mtok", "output_mtok"} & {k for k, v in vars(model.get_prices(NOW)).items() if v is not None}
        assert (KnownModel("x", model).price_at(milliseconds(NOW)) is None) == (not tokens), model.id


async def test_a_model_is_found_by_where_it_is_served_and_what_it_is_called_there() -> None:
    known = KnownPrices()
    found = await known.find("https://api.openai.com/v1", "gpt-4o-2024-08-06")
    assert found is not None and found.name == f"genai-prices {__version__}: openai/gpt-4o"
    price = found.price_at(milliseconds(NOW))
    assert price is not None and (price.input, price.cached_input, price.output) == (
        2_500_000_000,
        1_250_000_000,
        10_000_000_000,
    )
    azure = await known.find("https://acme.openai.azure.com/openai/v1", "gpt-4o")
    assert azure is not None
    for base_url, model in (
        ("https://api.openai.com/v1", "no-such-model"),
        ("http://127.0.0.1:8000/v1", "gpt-4o"),
        ("https://api.openai.com.example.org/v1", "no-such-model"),
        ("", ""),
    ):
        assert await known.find(base_url, model) is None


async def test_what_is_left_out_is_said() -> None:
    found = await KnownPrices().find("https://generativelanguage.googleapis.com/v1beta/openai", "gemini-2.5-flash")
    price = found.price_at(milliseconds(NOW)) if found is not None else None
    assert price is not None and "input_audio_mtok" in price.source.partition(" (without ")[2]


def model_of(*prices: ConditionalPrice) -> KnownModel:
    return KnownModel("x", ModelInfo(id="m", match=ClauseEquals("m"), prices=list(prices)))


def rate(dollars: str) -> ModelPrice:
    return ModelPrice(input_mtok=Decimal(dollars))


def test_rates_and_tiers_become_whole_nanodollars() -> None:
    prices = ModelPrice(
        input_mtok=TieredPrices(Decimal("1.25"), [LibraryTier(200_000, Decimal("2.5"))]),
        output_mtok=TieredPrices(Decimal(10), [LibraryTier(100_000, Decimal(12)), LibraryTier(200_000, Decimal(15))]),
        cache_read_mtok=Decimal("0.000000001"),
        requests_kcount=Decimal(5),
    )
    assert (
        model_of(ConditionalPrice(prices=prices)).price_at(0)
        == Price(
            source="x",
            input=1_250_000_000,
            cached_input=1,
            output=10_000_000_000,
            request=5_000_000,
            tiers=(
                Tier(100_001, 1_250_000_000, 1, 12_000_000_000),
                Tier(200_001, 2_500_000_000, 1, 15_000_000_000),
            ),
        ).sealed()
    )


@pytest.mark.parametrize("bad", [Decimal(-1), Decimal("NaN"), Decimal("Infinity"), Decimal(10**10)])
def test_what_is_no_price_is_not_expressed(bad: Decimal) -> None:
    model = model_of(ConditionalPrice(prices=ModelPrice(input_mtok=bad)))
    assert model.price_at(0) is None and model.periods(0, 10) is None


def test_prices_that_begin_on_a_day_follow_each_other_without_gaps() -> None:
    first, second = NOW.date() - timedelta(days=3), NOW.date() + timedelta(days=30)
    model = model_of(
        ConditionalPrice(prices=rate("1")),
        ConditionalPrice(StartDateConstraint(first), prices=rate("2")),
        ConditionalPrice(StartDateConstraint(second), prices=rate("3")),
    )
    begin, turn = milliseconds(NOW), milliseconds(datetime.combine(second, datetime.min.time(), UTC))
    found = model.periods(begin, begin + 1)
    assert found is not None
    assert [(p.price.input, p.from_ms, p.to_ms) for p in found] == [
        (2 * NANOS, begin, turn),
        (3 * NANOS, turn, None),
    ]


def test_prices_by_the_time_of_day_are_said_for_the_time_that_is_asked_for() -> None:
    night = TimeOfDateConstraint(
        datetime(1970, 1, 1, 22, tzinfo=UTC).timetz(), datetime(1970, 1, 1, 6, tzinfo=UTC).timetz()
    )
    model = model_of(ConditionalPrice(prices=rate("2")), ConditionalPrice(night, prices=rate("1")))
    begin = milliseconds(NOW)
    found = model.periods(begin, begin + 2 * 86_400_000)
    assert found is not None
    hours = [((p.from_ms - begin) // 3_600_000, p.price.input // NANOS) for p in found]
    assert hours[:5] == [(0, 2), (10, 1), (18, 2), (34, 1), (42, 2)]
    assert [p.to_ms for p in found] == [*(p.from_ms for p in found[1:]), None]
    assert found[-1].from_ms >= begin + 86_400_000


def test_all_the_library_s_own_conditions_are_followed_at_every_moment() -> None:
    for provider, model in priced():
        if not isinstance(model.prices, list):
            continue
        known = KnownModel("x", model)
        begin = milliseconds(NOW)
        found = known.periods(begin, begin + 2 * 86_400_000)
        if found is None:
            continue
        for hours in (0, 1, 5, 13, 16, 18, 20, 30, 47):
            at = NOW + timedelta(hours=hours)
            price = next(p.price for p in reversed(found) if p.from_ms <= milliseconds(at))
            wanted = by_library(provider, model, (1_000, 10, 100), at)
            assert abs(price.rate(Tokens(1_000, 10, 100), 0) - wanted) <= 1, (provider.id, model.id, at)


def test_the_library_is_imported_in_one_module_and_only_when_it_is_needed() -> None:
    imports = re.compile(r"^\s*(from|import) genai_prices", re.MULTILINE)
    sources = Path(helixflow.__file__).parent.rglob("*.py")
    assert [path.name for path in sources if imports.search(path.read_text())] == ["price_sources.py"]
    program = "import sys, helixflow.auth.service; print('genai_prices' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"
