"""Rating the ledger again: every row costs what it was charged, and what does not is named."""

import random
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import pytest

from helixflow.auth import rating
from helixflow.core.errors import ErrorKind
from helixflow.metering.journal.records import SideCharge, Tokens
from helixflow.metering.money import NANOS, format_dollars, parse_dollars
from helixflow.metering.prices import Price, Tier, decode_price
from helixflow.metering.rows import Explanation, RequestRow
from helixflow.rpc.generated.auth_v1 import metering_pb2
from helixflow.rpc.generated.auth_v1 import usage_pb2 as pb
from helixflow.settings.deployments import LlamaCppDeployment, OpenAIDeployment
from helixflow.settings.models import ModelSettings
from helixflow.settings.tree import Settings
from helixflow.storage.engine import Database
from tests.harness.auth import Installation, Person, refused
from tests.harness.ledger import JOURNAL, NODE, make_row, ship

MODELS = (
    ModelSettings(name="m", deployments=(LlamaCppDeployment(engine="llama_cpp", source="file:/m.gguf"),)),
    ModelSettings(name="gpt", deployments=(OpenAIDeployment(engine="openai", base_url="http://10.0.0.1/v1"),)),
)
LOCAL, REMOTE, GONE = "m/llama_cpp-0", "gpt/openai-0", "old/openai-0"
OUTCOMES = ("completed", "failed", "cancelled", "interrupted")


@pytest.fixture
async def auth(database: Database) -> AsyncIterator[Installation]:
    installation = Installation(database, settings=Settings(models=MODELS))
    yield installation
    await installation.close()


@pytest.fixture
async def operator(auth: Installation) -> Person:
    return await auth.add_person(await auth.add_organisation(), roles={"": "owner"}, operator=True)


class Writer:
    """Fills the ledger as a shipper does."""

    def __init__(self, auth: Installation) -> None:
        self._auth = auth
        self._ledger = auth.metering.ledger
        self._number = 0

    async def write(self, rows: Sequence[RequestRow]) -> None:
        await self._ledger.open_journal(metering_pb2.OpenJournalRequest(journal_id=JOURNAL, node_id=NODE))
        positions = range(self._number * 100 + 100, (self._number + len(rows)) * 100 + 100, 100)
        self._number += len(rows)
        await self._ledger.ship_records(ship(list(zip(positions, rows, strict=True))))

    def row(self, number: int, price: Price, tokens: Tokens, engine_ms: int, **changes: Any) -> RequestRow:
        """A request that was rated by `price`, `number` milliseconds from now."""
        values = {
            "admitted_at_ms": self._auth.now * 1000 + number,
            "prompt_tokens": tokens.prompt,
            "cached_tokens": tokens.cached,
            "completion_tokens": tokens.completion,
            "engine_ms": engine_ms,
            "cost": price.rate(tokens, engine_ms),
            "price_version": price.version,
        }
        return make_row(number, **{**values, **changes})


def random_price(draw: random.Random) -> Price:
    def amount() -> int:
        return draw.choice((0, 1, draw.randrange(10**6), draw.randrange(100 * NANOS)))

    tiers = [Tier(start, amount(), amount(), amount()) for start in sorted(draw.sample(range(1, 5_000), 2))]
    return Price("", "set", amount(), amount(), amount(), amount(), amount(), tuple(tiers)).sealed()


def random_usage(draw: random.Random) -> Tokens:
    prompt = draw.randrange(6_000)
    return Tokens(prompt, draw.randint(0, prompt), draw.randrange(3_000))


def with_loser(row: RequestRow, price: Price) -> RequestRow:
    """The same, after another deployment was asked as well."""
    tokens = Tokens(7, 0, 3)
    charge = SideCharge(GONE, tokens, 12, price.rate(tokens, 12), price.version)
    explanation = msgspec.json.encode(Explanation(side=(charge,))).decode()
    return msgspec.structs.replace(row, cost=row.cost + charge.cost, explanation=explanation)


async def check(auth: Installation, caller: Person, **fields: Any) -> list[pb.CheckRatingResponse]:
    messages: list[pb.CheckRatingResponse] = await auth.call(caller, "CheckRating", pb.CheckRatingRequest(**fields))
    assert [message.done for message in messages] == [False] * (len(messages) - 1) + [True]
    return messages


async def test_every_row_costs_what_it_was_charged(
    auth: Installation, operator: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rating, "PAGE", 64)
    draw = random.Random(4)
    prices = [random_price(draw) for _ in range(20)]
    await auth.metering.prices.versions.keep(prices, auth.now)
    writer = Writer(auth)
    rows = [
        writer.row(
            number,
            draw.choice(prices),
            random_usage(draw),
            draw.choice((-1, 0, draw.randrange(90_000))),
            outcome=draw.choice(OUTCOMES),
            deployment=draw.choice((LOCAL, REMOTE, GONE)),
        )
        for number in range(290)
    ]
    rows += [with_loser(writer.row(290 + n, draw.choice(prices), random_usage(draw), 5), prices[n]) for n in range(10)]
    await writer.write(rows)
    auth.clock.advance(10)
    messages = await check(auth, operator)
    assert [message.rows for message in messages] == [64, 128, 192, 256, 300]
    total = sum(row.cost for row in rows)
    assert (messages[-1].differing, list(messages[-1].differences)) == (0, [])
    assert messages[-1].recorded == messages[-1].rated == format_dollars(total)


async def test_what_was_charged_otherwise_is_named(auth: Installation, operator: Person) -> None:
    price = Price(source="set", input=NANOS, cached_input=NANOS, output=0).sealed()
    await auth.metering.prices.versions.keep([price], auth.now)
    writer = Writer(auth)
    used = Tokens(1_000, 0, 0)
    rows = [writer.row(number, price, used, -1) for number in range(30)]
    wrong = [writer.row(number, price, used, -1, cost=1_000_001) for number in range(30, 60)]
    unknown = writer.row(60, price, used, -1, price_version="f" * 16)
    # What came to nothing has no price, and what was lost with its journal is charged as it was reserved.
    nothing = writer.row(61, price, Tokens(), -1, price_version="", cost=0, deployment="", outcome="failed")
    lost = writer.row(62, price, Tokens(), -1, price_version="", cost=77, deployment="", outcome="lost")
    overcharged = writer.row(63, price, Tokens(), -1, price_version="", cost=5, deployment="")
    await writer.write([*rows, *wrong, unknown, nothing, lost, overcharged])
    auth.clock.advance(10)
    (found,) = await check(auth, operator)
    assert (found.rows, found.differing, len(found.differences)) == (64, 32, rating.NAMED)
    first = found.differences[0]
    assert (first.call_id, first.recorded, first.rated) == (wrong[0].call_id, "0.001000001", "0.001")
    assert first.price_version == price.version
    assert parse_dollars(found.recorded) == sum(row.cost for row in (*rows, *wrong, unknown, lost, overcharged))
    assert parse_dollars(found.rated) == 60 * 1_000_000 + 77
    (late,) = await check(auth, operator, **{"from": auth.now - 9, "to": auth.now})
    assert (late.rows, late.recorded) == (0, "0.00")


async def test_a_range_has_the_rows_that_were_admitted_in_it(auth: Installation, operator: Person) -> None:
    price = Price(source="set", request=NANOS).sealed()
    await auth.metering.prices.versions.keep([price], auth.now)
    writer = Writer(auth)
    start = auth.now
    moments = (0, 999, 1_000, 1_999, 2_000, 40 * 86_400_000)
    # An id is made a little before its call is admitted.
    rows = [
        writer.row(moment, price, Tokens(), 0, call_id=f"{start * 1000 + moment - 400:012x}{moment:020x}")
        for moment in moments
    ]
    await writer.write(rows)
    for begin, end, count in ((0, 1, 2), (1, 2, 2), (1, 3, 3), (2, 3, 1), (3, 4, 0), (0, 10**8, 6), (86_400, 10**8, 1)):
        (found,) = await check(auth, operator, **{"from": start + begin, "to": start + end})
        assert found.rows == count, (begin, end)
    for begin, end in ((5, 5), (6, 5), (-1, 5), (0, 2**50), (2**50, 0)):
        async with refused(ErrorKind.UNPROCESSABLE, "to"):
            await check(auth, operator, **{"from": begin, "to": end})


async def test_current_prices_are_those_for_the_moment_of_the_row(auth: Installation, operator: Person) -> None:
    """A price that was set beforehand counts from its moment on; what nobody knows any more keeps its price."""
    start = auth.now
    paid = Price(source="set", input=NANOS, cached_input=NANOS).sealed()
    await auth.metering.prices.versions.keep([paid], start)
    for subject, begin in ((LOCAL, start + 10), (GONE, start + 20)):
        request = pb.SetPriceRequest(
            subject_kind="deployment", subject=subject, rates=pb.Rates(input="2"), valid_from=begin
        )
        await auth.call(operator, "SetPrice", request)
    writer = Writer(auth)
    used = Tokens(1_000_000, 0, 0)
    seconds = (5, 15, 25)
    places = (LOCAL, REMOTE, GONE)
    rows = [
        writer.row(1_000 * second + index, paid, used, -1, deployment=place)
        for second in seconds
        for index, place in enumerate(places)
    ]
    await writer.write(rows)
    auth.clock.advance(60)
    (as_recorded,) = await check(auth, operator)
    assert as_recorded.differing == 0
    (now,) = await check(auth, operator, current=True)
    by_call = {difference.call_id: difference.rated for difference in now.differences}
    rated = [by_call.get(row.call_id, "1.00") for row in rows]
    # Free until its price began, ten dollars by default, and what was recorded until a price was set.
    assert rated == ["0.00", "10.00", "1.00", "2.00", "10.00", "1.00", "2.00", "10.00", "2.00"]


async def test_what_a_gateway_was_told_rates_the_row(auth: Installation, operator: Person) -> None:
    """The whole way: resolved, rated, shipped, checked; also after the price has changed."""
    request = metering_pb2.ResolvePricesRequest(deployments=auth.metering.prices.configured.values())
    answer = await auth.metering.prices.resolve(request)
    writer = Writer(auth)
    rows = [
        writer.row(number, decode_price(dated.price), Tokens(1_234, 17, 99), 456, deployment=dated.deployment)
        for number, dated in enumerate(answer.prices)
    ]
    await writer.write(rows)
    auth.clock.advance(10)
    change = pb.SetPriceRequest(subject_kind="model", subject="gpt", rates=pb.Rates(input="1"))
    await auth.call(operator, "SetPrice", change)
    for current in (False, True):
        (found,) = await check(auth, operator, current=current)
        assert (found.rows, found.differing) == (2, 0)
