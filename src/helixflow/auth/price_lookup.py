"""What deployments charge: what operators have set, else what is known of providers' models, else the default.

A price set for a deployment goes before one set for its model. Where a set price ends, the next of them holds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Row, or_, select, tuple_

from helixflow.auth.lookups import Lookups
from helixflow.auth.price_sources import KnownModel, KnownPrices
from helixflow.auth.price_versions import PriceVersions
from helixflow.core.clock import Clock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.deployments import deployment_refs
from helixflow.metering.money import parse_dollars
from helixflow.metering.prices import Price, PricePeriod, decode_price, encode_price
from helixflow.rpc.generated.auth_v1 import metering_pb2
from helixflow.settings.tree import MeteringSettings, ModelSettings
from helixflow.storage.engine import Database
from helixflow.storage.schema import price_versions, prices

MODEL: Final = "model"
DEPLOYMENT: Final = "deployment"
# Of one question. A gateway has far fewer, and PostgreSQL takes so many parameters.
MAX_DEPLOYMENTS: Final = 5_000
# Prices that change within the day are said for so long; gateways ask again within the hour.
HORIZON_MS: Final = 2 * 86_400_000
# Engines of our own, which nobody sends a bill for.
_LOCAL_ENGINES: Final = frozenset({"llama_cpp"})
_DEFAULT: Final = "default"
_BATCH: Final = 500
_Ref = metering_pb2.DeploymentRef


@dataclass(frozen=True, slots=True)
class Timeline:
    """What one deployment charges when. `layers` are prices that were set, those that go before first; `known` and
    `fallback` hold where none of them does.
    """

    ref: _Ref
    layers: tuple[tuple[PricePeriod, ...], ...]
    known: KnownModel | None
    fallback: Price

    def price_at(self, at_ms: int) -> Price:
        """The price that holds then."""
        if (price := self.set_at(at_ms)) is not None:
            return price
        return (self.known.price_at(at_ms) if self.known is not None else None) or self.fallback

    def set_at(self, at_ms: int) -> Price | None:
        """The price that was set for then, None where none was."""
        for layer in self.layers:
            for period in layer:
                if period.from_ms <= at_ms and (period.to_ms is None or at_ms < period.to_ms):
                    return period.price
        return None

    def periods(self, from_ms: int) -> list[PricePeriod]:
        """All prices from then on, without gaps; the last one for ever."""
        beneath = self.known.periods(from_ms, from_ms + HORIZON_MS) if self.known is not None else None
        if beneath is None:
            beneath = [PricePeriod(self.fallback, from_ms, None)]
        turns = {from_ms}
        for layer in (*self.layers, beneath):
            for period in layer:
                turns.update((period.from_ms, from_ms if period.to_ms is None else period.to_ms))
        found: list[PricePeriod] = []
        for at_ms in sorted(turn for turn in turns if turn >= from_ms):
            price = self.set_at(at_ms) or next(p.price for p in reversed(beneath) if p.from_ms <= at_ms)
            if found and found[-1].price == price:
                continue
            if found:
                found[-1] = PricePeriod(found[-1].price, found[-1].from_ms, at_ms)
            found.append(PricePeriod(price, at_ms, None))
        return found


class PriceLookup:
    """Answers out of the database, always as it is now. What it tells anybody has been stored before.

    `models` are those that this installation's configuration has. Raises `HelixError`s of `storage`.
    """

    def __init__(
        self,
        database: Database,
        metering: MeteringSettings,
        models: Iterable[ModelSettings],
        clock: Clock,
        known: KnownPrices | None = None,
    ) -> None:
        self.versions = PriceVersions(database)
        self.configured = {ref.deployment: ref for ref in deployment_refs(models)}
        self._lookups = Lookups(database)
        self._known = known or KnownPrices()
        self._clock = clock
        self._free = Price(source=_DEFAULT).sealed()
        unpriced_input = parse_dollars(metering.unpriced_input)
        self._unpriced = Price(
            source=_DEFAULT,
            input=unpriced_input,
            cached_input=unpriced_input,
            output=parse_dollars(metering.unpriced_output),
        ).sealed()

    async def resolve(self, request: metering_pb2.ResolvePricesRequest) -> metering_pb2.ResolvePricesResponse:
        """MeteringService.ResolvePrices: for each deployment its prices from now on."""
        if len(request.deployments) > MAX_DEPLOYMENTS:
            message = f"Ask for at most {MAX_DEPLOYMENTS} deployments at once."
            raise HelixError(ErrorKind.INVALID_VALUE, message, param="deployments")
        now = self._clock.now()
        now_ms = int(now * 1000)
        timelines = await self.timelines(request.deployments, since_s=int(now))
        found = [(timeline.ref.deployment, timeline.periods(now_ms)) for timeline in timelines]
        await self.versions.keep((period.price for _, periods in found for period in periods), int(now))
        answer = metering_pb2.ResolvePricesResponse()
        for deployment, periods in sorted(found, key=lambda pair: pair[0]):
            for period in periods:
                answer.prices.add(
                    deployment=deployment,
                    valid_from_ms=period.from_ms,
                    valid_to_ms=period.to_ms or 0,
                    price=encode_price(period.price),
                )
        return answer

    async def timelines(self, refs: Iterable[_Ref], *, since_s: int = 0) -> list[Timeline]:
        """One for each of them, in order. Set prices that ended before `since_s` (seconds since the epoch) are not in
        them.
        """
        asked = list({ref.deployment: ref for ref in refs}.values())
        layers = await self._layers(asked, since_s)
        return [
            Timeline(
                ref,
                (layers.get((DEPLOYMENT, ref.deployment), ()), layers.get((MODEL, ref.model), ())),
                await self._known.find(ref.base_url, ref.upstream_model) if ref.base_url else None,
                self._free if ref.engine in _LOCAL_ENGINES else self._unpriced,
            )
            for ref in asked
        ]

    async def _layers(self, refs: Sequence[_Ref], since_s: int) -> dict[tuple[str, str], tuple[PricePeriod, ...]]:
        subjects = sorted({(DEPLOYMENT, ref.deployment) for ref in refs} | {(MODEL, ref.model) for ref in refs})
        rows: list[Row[Any]] = []
        for start in range(0, len(subjects), _BATCH):
            part = subjects[start : start + _BATCH]
            query = _SET.where(tuple_(prices.c.subject_kind, prices.c.subject).in_(part))
            rows += await self._lookups.execute(
                query.where(or_(prices.c.valid_to.is_(None), prices.c.valid_to > since_s)).order_by(prices.c.valid_from)
            )
        layers: dict[tuple[str, str], tuple[PricePeriod, ...]] = {}
        for row in rows:
            key = (row.subject_kind, row.subject)
            layers[key] = (*layers.get(key, ()), _period(row))
        return layers


_SET: Final = select(prices, price_versions.c.body).join(
    price_versions, price_versions.c.version == prices.c.price_version
)


def _period(row: Row[Any]) -> PricePeriod:
    to_ms = None if row.valid_to is None else row.valid_to * 1000
    return PricePeriod(decode_price(row.body), row.valid_from * 1000, to_ms)
