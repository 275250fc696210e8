"""Prices at hand in a gateway, with an auth service that says what the test tells it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from helixflow.clients.changes import ChangeWatch
from helixflow.core.clock import FakeClock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.journal.records import Tokens
from helixflow.metering.price_book import PriceBook
from helixflow.metering.prices import Price, encode_price
from helixflow.process.backoff import Backoff
from helixflow.rpc.generated.auth_v1 import identity_pb2, metering_pb2

START_MS = 1_700_000_000_000
LOCAL, REMOTE = "m/llama_cpp-0", "m/openai-1"
CHEAP = Price(source="set", input=1_000_000).sealed()
DEAR = Price(source="set", input=5_000_000).sealed()


class ScriptedChannel:
    """A channel whose RPCs answer from `answers`, each once; an exception is raised, without one it takes for ever."""

    def __init__(self) -> None:
        self.answers: asyncio.Queue[metering_pb2.ResolvePricesResponse | HelixError] = asyncio.Queue()
        self.asked: list[metering_pb2.ResolvePricesRequest] = []
        self.taken = asyncio.Event()

    def unary_unary(self, path: str, **_: Any) -> Any:
        async def call(request: Any, timeout: float) -> Any:
            assert path.endswith("/ResolvePrices") and 0 < timeout <= 5
            self.asked.append(request)
            self.taken.set()
            answer = await self.answers.get()
            if isinstance(answer, HelixError):
                raise answer
            return answer

        return call

    def unary_stream(self, *_: Any, **__: Any) -> None:
        return None


class Bench:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.channel = ScriptedChannel()
        channel: Any = self.channel
        self.watch = ChangeWatch(channel, clock=self.clock)
        refs = [metering_pb2.DeploymentRef(deployment=name, model="m") for name in (LOCAL, REMOTE)]
        self.book = PriceBook(channel, self.watch, refs, self.clock, backoff=Backoff(initial_s=0, maximum_s=0))

    def change(self, kind: "identity_pb2.ChangeKind.ValueType" = identity_pb2.CHANGE_KIND_PRICES) -> None:
        for follower in self.watch._followers:
            follower.apply(identity_pb2.Change(kind=kind))

    async def answer(self, *prices: tuple[str, Price, int, int]) -> None:
        """Gives the next answer and lets the book take it in."""
        await self.channel.answers.put(answer_of(*prices))
        await self.settle()

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)


def answer_of(*prices: tuple[str, Price, int, int]) -> metering_pb2.ResolvePricesResponse:
    answer = metering_pb2.ResolvePricesResponse()
    for name, price, begun, ended in prices:
        answer.prices.add(deployment=name, price=encode_price(price), valid_from_ms=begun, valid_to_ms=ended)
    return answer


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    task = asyncio.create_task(bench.book.run())
    await bench.settle()
    try:
        yield bench
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


BOTH = ((LOCAL, CHEAP, START_MS, 0), (REMOTE, DEAR, START_MS, 0))


async def test_before_the_first_answer_nothing_is_rated_and_the_book_says_so(bench: Bench) -> None:
    assert not bench.book.ready
    assert bench.book.price(LOCAL, START_MS) == Price()
    assert [ref.deployment for ref in bench.channel.asked[0].deployments] == [LOCAL, REMOTE]
    await bench.answer(*BOTH)
    assert bench.book.ready
    assert (bench.book.price(LOCAL, START_MS), bench.book.price(REMOTE, START_MS)) == (CHEAP, DEAR)


async def test_the_dearest_of_the_candidates_bounds_what_a_call_costs(bench: Bench) -> None:
    await bench.answer(*BOTH)
    used = Tokens(1_000, 0, 0)
    assert bench.book.dearest_bound([LOCAL], START_MS, 1_000, 0, 0) == CHEAP.rate(used, 0)
    assert bench.book.dearest_bound([LOCAL, REMOTE], START_MS, 1_000, 0, 0) == DEAR.rate(used, 0)
    assert bench.book.dearest_bound([], START_MS, 1_000, 0, 0) == 0


async def test_prices_change_at_the_moment_that_was_told_beforehand(bench: Bench) -> None:
    turn = START_MS + 5_000
    await bench.answer((LOCAL, CHEAP, START_MS, turn), (LOCAL, DEAR, turn, 0), BOTH[1])
    moments = {START_MS - 60_000: CHEAP, START_MS: CHEAP, turn - 1: CHEAP, turn: DEAR, turn + 10**10: DEAR}
    for _ in range(2):
        for moment, price in moments.items():
            assert bench.book.price(LOCAL, moment) == price, moment


async def test_a_change_is_asked_for_and_the_known_prices_go_on_meanwhile(bench: Bench) -> None:
    await bench.answer(*BOTH)
    bench.change(identity_pb2.CHANGE_KIND_POLICIES)
    await bench.settle()
    assert len(bench.channel.asked) == 1
    bench.clock.advance(10)
    bench.change()
    await bench.settle()
    now = START_MS + 10_000
    assert len(bench.channel.asked) == 2 and bench.book.ready and bench.book.price(LOCAL, now) == CHEAP
    await bench.answer((LOCAL, DEAR, now, 0), BOTH[1])
    assert bench.book.price(LOCAL, now + 1) == DEAR


async def test_a_call_keeps_the_price_that_was_known_when_it_was_admitted(bench: Bench) -> None:
    await bench.answer(*BOTH)
    bench.clock.advance(10)
    now = START_MS + 10_000
    bench.book.forget()
    # The clock of auth is behind ours by three seconds.
    await bench.answer((LOCAL, DEAR, now - 3_000, 0), BOTH[1])
    assert bench.book.price(LOCAL, now) == bench.book.price(LOCAL, now - 2_000) == CHEAP
    assert bench.book.price(LOCAL, now + 1) == DEAR
    for _ in range(3):
        bench.clock.advance(86_400)
        bench.book.forget()
        await bench.answer((LOCAL, DEAR, now, 0), BOTH[1])
    assert bench.book.price(LOCAL, now + 3 * 86_400_000) == DEAR
    assert len(bench.book._timelines[LOCAL]) == 1


async def test_a_change_while_an_answer_is_under_way_is_asked_for_again(bench: Bench) -> None:
    bench.change()
    await bench.answer(*BOTH)
    assert len(bench.channel.asked) == 2
    await bench.answer((LOCAL, DEAR, START_MS, 0), BOTH[1])
    assert bench.book.price(LOCAL, START_MS + 5_000) == DEAR


@pytest.mark.parametrize(
    "bad",
    [
        HelixError(ErrorKind.UNAVAILABLE, "away"),
        answer_of(BOTH[0]),
        answer_of(*BOTH, ("x/y-0", CHEAP, START_MS, 0)),
        answer_of((LOCAL, CHEAP, START_MS, START_MS + 5), (LOCAL, DEAR, START_MS + 6, 0), BOTH[1]),
        answer_of((LOCAL, CHEAP, START_MS, START_MS + 5), BOTH[1]),
        metering_pb2.ResolvePricesResponse(prices=[metering_pb2.DatedPrice(deployment=LOCAL, price=b"{")]),
    ],
)
async def test_without_a_good_answer_it_asks_again(
    bench: Bench, bad: HelixError | metering_pb2.ResolvePricesResponse
) -> None:
    await bench.channel.answers.put(bad)
    await bench.settle()
    assert not bench.book.ready
    await bench.answer(*BOTH)
    assert bench.book.ready
    bench.book.forget()
    await bench.channel.answers.put(bad)
    await bench.settle()
    assert bench.book.price(REMOTE, START_MS) == DEAR
    await bench.answer(BOTH[0], (REMOTE, CHEAP, START_MS, 0))
    assert bench.book.price(REMOTE, START_MS + 5_000) == CHEAP


async def test_who_has_no_prices_says_so_once_and_when_they_are_there(bench: Bench) -> None:
    async def fail(advance_s: float) -> None:
        bench.clock.advance(advance_s)
        await bench.channel.answers.put(HelixError(ErrorKind.UNAVAILABLE, "away"))
        await bench.settle()

    with capture_logs() as logs:
        # The services come up in any order.
        await fail(9.9)
        assert not logs
        for _ in range(3):
            await fail(0.1)
        assert [(line["event"], line["log_level"], line["code"]) for line in logs] == [
            ("prices.unknown", "warning", HelixError(ErrorKind.UNAVAILABLE, "away").code)
        ]
        await bench.answer(*BOTH)
        assert [(line["event"], line["log_level"]) for line in logs[1:]] == [("prices.known", "info")]
        # From then on each time that they cannot be read, at once.
        for _ in range(2):
            bench.book.forget()
            await fail(0)
            await fail(0)
            await bench.answer(*BOTH)
    assert [line["event"] for line in logs[2:]] == ["prices.unreadable", "prices.restored"] * 2


async def test_without_deployments_nobody_is_asked() -> None:
    channel: Any = ScriptedChannel()
    clock = FakeClock()
    assert PriceBook(channel, ChangeWatch(channel, clock=clock), [], clock).ready


async def test_other_deployments_are_priced_before_they_are_used_and_what_is_gone_can_still_be_settled(
    bench: Bench,
) -> None:
    await bench.answer((LOCAL, CHEAP, START_MS, 0), (REMOTE, DEAR, START_MS, 0))
    at_ms = int(bench.clock.now() * 1000) + 10
    refs = [metering_pb2.DeploymentRef(deployment=name, model="m") for name in (REMOTE, "n/openai-0")]
    using = asyncio.create_task(bench.book.use(refs))
    await bench.settle()
    assert not using.done()
    assert [ref.deployment for ref in bench.channel.asked[-1].deployments] == ["n/openai-0"], "the others are known"
    await bench.answer(("n/openai-0", DEAR, START_MS, 0))
    await using
    assert bench.book.price("n/openai-0", at_ms) == DEAR
    assert bench.book.price(LOCAL, at_ms) == CHEAP, "its last calls are settled by what it cost"
    # What changes is asked for those that are used.
    bench.change()
    await bench.answer((REMOTE, CHEAP, START_MS, 0), ("n/openai-0", CHEAP, START_MS, 0))
    assert bench.book.price(REMOTE, at_ms + 1000) == CHEAP
    bench.clock.advance(2 * 86_400)
    await bench.book.use(refs)
    with pytest.raises(KeyError):
        bench.book.price(LOCAL, at_ms)


async def test_deployments_that_nobody_can_price_change_nothing(bench: Bench) -> None:
    await bench.answer((LOCAL, CHEAP, START_MS, 0), (REMOTE, DEAR, START_MS, 0))
    await bench.channel.answers.put(HelixError(ErrorKind.UNAVAILABLE, "away"))
    with pytest.raises(HelixError):
        await bench.book.use([metering_pb2.DeploymentRef(deployment="n/openai-0", model="n")])
    bench.change()
    await bench.answer((LOCAL, DEAR, START_MS, 0), (REMOTE, DEAR, START_MS, 0))
    assert bench.book.price(LOCAL, int(bench.clock.now() * 1000) + 1000) == DEAR


async def test_a_deployment_of_the_same_name_at_another_place_has_the_price_of_that(bench: Bench) -> None:
    await bench.answer((LOCAL, CHEAP, START_MS, 0), (REMOTE, DEAR, START_MS, 0))
    moved = metering_pb2.DeploymentRef(deployment=REMOTE, model="m", base_url="https://elsewhere.example/v1")
    local = metering_pb2.DeploymentRef(deployment=LOCAL, model="m")
    using = asyncio.create_task(bench.book.use([local, moved]))
    await bench.settle()
    await bench.answer((REMOTE, CHEAP, START_MS, 0))
    await using
    now_ms = int(bench.clock.now() * 1000)
    assert (bench.book.price(REMOTE, now_ms + 1000), bench.book.price(REMOTE, now_ms)) == (CHEAP, DEAR)
