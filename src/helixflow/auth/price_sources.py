"""The prices of known providers' models, from the library genai-prices: read from what is installed, never fetched.

Imported only here, and only once a provider's model is asked for: it takes 0.2 s and 24 MB.
"""

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from helixflow.metering.money import MAX_NANODOLLARS, NANOS
from helixflow.metering.prices import Price, PricePeriod, Tier

if TYPE_CHECKING:
    from genai_prices.data_snapshot import DataSnapshot
    from genai_prices.types import ModelInfo, ModelPrice

_INPUT: Final = "input_mtok"
_CACHED: Final = "cache_read_mtok"
_OUTPUT: Final = "output_mtok"
# Dollars for a thousand requests.
_REQUESTS: Final = "requests_kcount"
_EXPRESSED: Final = frozenset({_INPUT, _CACHED, _OUTPUT, _REQUESTS})


class KnownPrices:
    """Finds models by where they are served and what they are called there."""

    async def find(self, base_url: str, model: str) -> "KnownModel | None":
        """None for a provider or a model that the library does not know."""
        # In a thread, for the import.
        return await asyncio.to_thread(self._find, base_url, model)

    def _find(self, base_url: str, model: str) -> "KnownModel | None":
        try:
            provider, found = self._snapshot.find_provider_model(model, None, None, base_url)
        except LookupError:
            return None
        return KnownModel(f"{self._library}: {provider.id}/{found.id}", found)

    @cached_property
    def _snapshot(self) -> "DataSnapshot":
        from genai_prices.data_snapshot import get_snapshot

        return get_snapshot()

    @cached_property
    def _library(self) -> str:
        from genai_prices import __version__

        return f"genai-prices {__version__}"


class KnownModel:
    """What the library says of one model. `name` says from which release, and which model it is."""

    def __init__(self, name: str, model: "ModelInfo") -> None:
        self.name = name
        self._model = model

    def price_at(self, at_ms: int) -> Price | None:
        """The price at that moment, sealed; None when it cannot be expressed: the model has no rate for tokens then, or
        its tiers depend on something else.

        What the library prices beside tokens and requests (tokens of sound and pictures, tokens written to a cache,
        searches), or prices differently where we do not tell it apart, is left out and named in `Price.source`.
        """
        return _convert(self.name, self._model.get_prices(_moment(at_ms)))

    def periods(self, from_ms: int, until_ms: int) -> list[PricePeriod] | None:
        """The prices from `from_ms` on without gaps, the last one for ever; None when one of them cannot be expressed.

        Those that depend on the time of day change until `until_ms`, and then no more.
        """
        periods: list[PricePeriod] = []
        for at_ms in (from_ms, *sorted(self._turns(from_ms, until_ms))):
            price = self.price_at(at_ms)
            if price is None:
                return None
            if periods and periods[-1].price == price:
                continue
            if periods:
                periods[-1] = PricePeriod(periods[-1].price, periods[-1].from_ms, at_ms)
            periods.append(PricePeriod(price, at_ms, None))
        return periods

    def _turns(self, from_ms: int, until_ms: int) -> set[int]:
        """Moments after `from_ms` at which another price may begin."""
        if not isinstance(self._model.prices, list):
            return set()
        turns: set[int] = set()
        for conditional in self._model.prices:
            turns.update(_turns_of(conditional.constraint, from_ms, until_ms))
        return {turn for turn in turns if turn > from_ms}


def _turns_of(constraint: Any, from_ms: int, until_ms: int) -> Iterator[int]:
    from genai_prices.types import StartDateConstraint, TimeOfDateConstraint

    if isinstance(constraint, StartDateConstraint):
        yield _milliseconds(datetime.combine(constraint.start_date, datetime.min.time(), UTC))
    elif isinstance(constraint, TimeOfDateConstraint):
        day = _moment(from_ms).date()
        while _milliseconds(datetime.combine(day, datetime.min.time(), UTC)) <= until_ms:
            for time in (constraint.start_time, constraint.end_time):
                aware = time if time.tzinfo is not None else time.replace(tzinfo=UTC)
                # As the library does: a time of day is one of the day in UTC.
                at = datetime.combine(day, aware).astimezone(UTC).timetz()
                yield _milliseconds(datetime.combine(day, at))
            day += timedelta(days=1)


def _convert(name: str, prices: "ModelPrice") -> Price | None:
    given = {key: value for key, value in vars(prices).items() if value is not None}
    if not given.keys() & {_INPUT, _OUTPUT}:
        return None
    starts = sorted({tier.start for key in (_INPUT, _CACHED, _OUTPUT) for tier in getattr(given.get(key), "tiers", ())})
    left_out = sorted(given.keys() - _EXPRESSED)
    request = given.get(_REQUESTS, Decimal(0))
    if not isinstance(request, Decimal):
        return None
    try:
        plain, *tiers = [_rates(given, start) for start in (None, *starts)]
        return Price(
            source=f"{name} (without {', '.join(left_out)})" if left_out else name,
            input=plain[0],
            cached_input=plain[1],
            output=plain[2],
            request=_nanodollars(request / 1000),
            # The library's tiers begin above their start.
            tiers=tuple(Tier(start + 1, *rates) for start, rates in zip(starts, tiers, strict=True)),
        ).sealed()
    except ValueError:
        return None


def _rates(given: dict[str, Any], start: int | None) -> tuple[int, int, int]:
    """Nanodollars for a million prompt tokens, cached ones and completion tokens, in the tier that begins there."""
    input_rate = _at(given.get(_INPUT), start)
    cached = given.get(_CACHED)
    return input_rate, input_rate if cached is None else _at(cached, start), _at(given.get(_OUTPUT), start)


def _at(rate: Any, start: int | None) -> int:
    if rate is None:
        return 0
    if isinstance(rate, Decimal):
        return _nanodollars(rate)
    chosen = rate.base
    for tier in rate.tiers:
        if start is not None and tier.start <= start:
            chosen = tier.price
    return _nanodollars(chosen)


def _nanodollars(dollars: Decimal) -> int:
    """Exact: the library has at most nine decimals, but for a few rates that were floats once (0.13999999999999999),
    which are rounded. Raises `ValueError` for what is no price.
    """
    if not dollars.is_finite() or dollars < 0 or dollars * NANOS > MAX_NANODOLLARS:
        raise ValueError("not a price")
    return int((dollars * NANOS).to_integral_value(ROUND_HALF_UP))


def _moment(at_ms: int) -> datetime:
    return datetime.fromtimestamp(at_ms // 1000, UTC)


def _milliseconds(moment: datetime) -> int:
    return int(moment.timestamp()) * 1000
