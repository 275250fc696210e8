"""What deployments charge: what operators have set, else what is known of providers' models, else the default.

A price set for a deployment goes before one set for its model. Where a set price ends, the next of them holds.
"""

from collections.abc import Iterable, Mapping, Sequence
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
from helixflow.settings.models import ModelSettings
from helixflow.settings.tree import MeteringSettings
from helixflow.storage.engine import Database
from helixflow.storage.schema import price_versions, prices

MODEL: Final = "model"
DEPLOYMENT: Final = "deployment"
# Of one question. A gateway has far fewer, and PostgreSQL takes so many parameters.
MAX_DEPLOYMENTS: Final = 5_000
# Prices that change within the day are said for so long; gateways ask again within the hour.
HORIZON_MS: Final = 2 * 86_400_000
# Engines of our own, which nobody sends a bill for.
_LOCAL_ENGINES: Final = frozenset({"llama_cpp", "vllm", "ollama"})
_DEFAULT: Final = "default"
_BATCH: Final = 500


@dataclass(frozen=True, slots=True)
class SetPrice:
    """What an operator has set for a model or a deployment. Moments are seconds since the epoch; `valid_to` None: until
    further notice.
    """

    id: str
    kind: str
    subject: str
    price: Price
    valid_from: int
    valid_to: int | None
    created_at: int

    @classmethod
    def of(cls, row: Row[Any]) -> "SetPrice":
        """From a row of `SET_PRICES`."""
        price = decode_price(row.body)
        return cls(row.id, row.subject_kind, row.subject, price, row.valid_from, row.valid_to, row.created_at)

    def holds_at(self, at_ms: int) -> bool:
        return self.valid_from * 1000 <= at_ms and (self.valid_to is None or at_ms < self.valid_to * 1000)


# Every price that was ever set, with its rates.
SET_PRICES: Final = select(prices, price_versions.c.body).join(
    price_versions, price_versions.c.version == prices.c.price_version
)


@dataclass(frozen=True, slots=True)
class Timeline:
    """What one deployment charges when. `layers` are prices that were set, those that go before first; `known` and
    `fallback` hold where none of them does.
    """

    ref: metering_pb2.DeploymentRef
    layers: tuple[tuple[SetPrice, ...], ...]
    known: KnownModel | None
    fallback: Price

    def price_at(self, at_ms: int) -> Price:
        """The price that holds then."""
        if (found := self.set_at(at_ms)) is not None:
            return found.price
        return (self.known.price_at(at_ms) if self.known is not None else None) or self.fallback

    def set_at(self, at_ms: int) -> SetPrice | None:
        """What was set for then, None where nothing was."""
        return next((found for layer in self.layers for found in layer if found.holds_at(at_ms)), None)

    def periods(self, from_ms: int) -> list[PricePeriod]:
        """All prices from then on, without gaps; the last one for ever."""
        beneath = self.known.periods(from_ms, from_ms + HORIZON_MS) if self.known is not None else None
        if beneath is None:
            beneath = [PricePeriod(self.fallback, from_ms, None)]
        turns = {period.from_ms for period in beneath}
        for layer in self.layers:
            for entry in layer:
                turns.update(moment * 1000 for moment in (entry.valid_from, entry.valid_to) if moment is not None)
        found: list[PricePeriod] = []
        for at_ms in sorted(turn for turn in turns if turn >= from_ms):
            held = self.set_at(at_ms)
            price = held.price if held is not None else _at(beneath, at_ms)
            if found and found[-1].price == price:
                continue
            if found:
                found[-1] = PricePeriod(found[-1].price, found[-1].from_ms, at_ms)
            found.append(PricePeriod(price, at_ms, None))
        return found


class PriceLookup:
    """Answers out of the database, always as it is now. What it tells anybody has been stored before.

    `models` are those that this installation's configuration has at first. Raises `HelixError`s of `storage`.
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
        self.configured: Mapping[str, metering_pb2.DeploymentRef] = {}
        self.use_models(models)
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

    def use_models(self, models: Iterable[ModelSettings]) -> None:
        """These are configured from now on."""
        self.configured = {ref.deployment: ref for ref in deployment_refs(models)}

    def ref_of(self, deployment: str) -> metering_pb2.DeploymentRef:
        """A deployment by its name: as configured, or as far as its name tells."""
        model, _, rest = deployment.rpartition("/")
        unknown = metering_pb2.DeploymentRef(deployment=deployment, model=model, engine=rest.rpartition("-")[0])
        return self.configured.get(deployment, unknown)

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

    async def timelines(self, refs: Iterable[metering_pb2.DeploymentRef], *, since_s: int = 0) -> list[Timeline]:
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

    async def _layers(
        self, refs: Sequence[metering_pb2.DeploymentRef], since_s: int
    ) -> dict[tuple[str, str], tuple[SetPrice, ...]]:
        subjects = sorted({(DEPLOYMENT, ref.deployment) for ref in refs} | {(MODEL, ref.model) for ref in refs})
        layers: dict[tuple[str, str], tuple[SetPrice, ...]] = {}
        for start in range(0, len(subjects), _BATCH):
            part = subjects[start : start + _BATCH]
            query = SET_PRICES.where(tuple_(prices.c.subject_kind, prices.c.subject).in_(part))
            query = query.where(or_(prices.c.valid_to.is_(None), prices.c.valid_to > since_s))
            for row in await self._lookups.execute(query.order_by(prices.c.valid_from)):
                key = (row.subject_kind, row.subject)
                layers[key] = (*layers.get(key, ()), SetPrice.of(row))
        return layers


def _at(periods: Sequence[PricePeriod], at_ms: int) -> Price:
    """The last one that has begun; the first one has."""
    return next(period.price for period in reversed(periods) if period.from_ms <= at_ms)
