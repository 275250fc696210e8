"""The life of one call: admitted, journalled, dispatched, settled once, whatever happens."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import msgspec
import pytest

from helixflow.core.call import Call, Meter, Operation, Plan, SideUsage, Stream, Usage
from helixflow.core.clock import FakeClock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.principal import Principal, PrincipalKind
from helixflow.dialects.openai_chat import parse_chat
from helixflow.dialects.validation import decode_fields
from helixflow.engines.answers import WholeAnswer
from helixflow.metering.admission import Demand, Grant, Refusal, Settlement
from helixflow.metering.demand import Estimator
from helixflow.metering.journal.reader import JournalReader
from helixflow.metering.journal.records import Admitted, Progressed, Record, Settled
from helixflow.metering.journal.writer import JournalWriter
from helixflow.metering.meter import Metered
from helixflow.metering.policies import NO_POLICIES, Budget, Limit, Metric, Period, Policies, Scope, Unit
from helixflow.metering.prices import Price
from helixflow.routing.table import Route

MILLION = 1_000_000
PRICE = Price(source="set", input=2_000 * MILLION, output=10_000 * MILLION).sealed()
OTHER_PRICE = Price(source="set", input=3_000 * MILLION, output=30_000 * MILLION, engine_second=5_000_000).sealed()
LIMIT = Limit("lim_1", "org", Scope.KEY, "key_1", "", Metric.REQUESTS_PER_MINUTE, 60, 60)
BUDGET = Budget("bud_1", "org", Scope.KEY, "key_1", Unit.MONEY, Period.DAY, 10**9)
POLICIES = Policies((LIMIT,), (BUDGET,))


class OnePolicy:
    def __init__(self, policies: Policies) -> None:
        self._policies = policies

    def cached(self, principal: Principal, model: str) -> Policies | None:
        return None

    async def resolve(self, principal: Principal, model: str) -> Policies:
        return self._policies


class OnePrice:
    ready = True

    def price(self, deployment: str, at_ms: int) -> Price:
        return OTHER_PRICE if deployment == "tiny/openai-1" else PRICE

    def dearest_bound(
        self, deployments: Sequence[str], at_ms: int, prompt_tokens: int, completion_tokens: int, engine_ms: int
    ) -> int:
        return PRICE.bound(prompt_tokens, completion_tokens, engine_ms)


class RecordingLimiter:
    """Grants, or refuses as told; remembers what it was asked and told."""

    def __init__(self) -> None:
        self.demands: list[Demand] = []
        self.settlements: list[Settlement] = []
        self.released: list[Settlement] = []
        self.refusal: Refusal | None = None
        self.state = Meter(60, 59, 1.0)

    def try_admit(self, demand: Demand) -> Grant | None:
        return None

    async def admit(self, demand: Demand) -> Grant:
        self.demands.append(demand)
        if self.refusal is not None:
            raise self.refusal
        return Grant((("l:lim_1", 1), ("b:bud_1:0", demand.cost_bound)), requests=self.state)

    def settle(self, settlement: Settlement) -> None:
        self.settlements.append(settlement)

    def release(self, settlements: Sequence[Settlement]) -> None:
        self.released += settlements

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        pass

    def figures(self) -> dict[str, float]:
        return {}


class Engine:
    """Answers as `act` says."""

    def __init__(self, act: Callable[[Call], Awaitable[Stream]]) -> None:
        self._act = act

    async def open(self, call: Call) -> Stream:
        call.progress.deployment = "tiny/llama_cpp-0"
        return await self._act(call)


async def answer(call: Call) -> Stream:
    usage = call.progress.usage
    usage.prompt_tokens, usage.completion_tokens, usage.reported = 7, 3, True
    return WholeAnswer(b"{}")


def chat(attempts: int = 1, **fields: object) -> Call:
    body = msgspec.json.encode({"model": "tiny", "messages": [{"role": "user", "content": "Hi."}], **fields})
    principal = Principal(PrincipalKind.KEY, "key_1", "one", "org", "proj", owner_id="user_1")
    return Call(
        "a" * 32,
        "req_1",
        principal,
        Operation.CHAT,
        "tiny",
        decode_fields(body),
        parse_chat(body),
        bool(fields.get("stream")),
        False,
        asyncio.get_running_loop().time() + 10,
        len(body),
        route=Route("tiny", plan=Plan(("tiny/llama_cpp-0",), 1000, attempts)),
    )


class Bench:
    """A metered engine with what it has written."""

    def __init__(self, folder: Path, engine: Engine, policies: Policies) -> None:
        self.folder = folder
        self.journal = JournalWriter.open(
            folder, segment_bytes=2**20, durability="os", sync_interval_s=60, clock=FakeClock()
        )
        self.limiter = RecordingLimiter()
        self.estimator = Estimator(expected_completion=50, media_tokens=100)
        self.metered = Metered(
            engine,
            estimator=self.estimator,
            policies=OnePolicy(policies),
            prices=OnePrice(),
            limiter=self.limiter,
            journal=self.journal,
            progress_interval_s=0.01,
            clock=FakeClock(),
        )

    def records(self) -> list[Record]:
        reader = JournalReader(self.folder / self.journal.journal_id, self.folder / "quarantine")
        return [record for _, _, record in reader.read(100, ended=False)]


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(act: Callable[[Call], Awaitable[Stream]] = answer, policies: Policies = POLICIES) -> Bench:
        made.append(Bench(tmp_path, Engine(act), policies))
        return made[-1]

    yield make
    for one in made:
        await one.journal.close()


async def test_a_whole_answer_is_settled_before_it_is_given(bench: Callable[..., Bench]) -> None:
    one = bench()
    call = chat(max_tokens=5, metadata={"team": "search"})
    await one.metered.open(call)
    admitted, settled = one.records()
    assert isinstance(admitted, Admitted)
    assert isinstance(settled, Settled)
    assert (admitted.call_id, admitted.key_id, admitted.user_id) == ("a" * 32, "key_1", "user_1")
    assert admitted.tags == {"team": "search"}
    assert admitted.policies == ("lim_1", "bud_1")
    assert settled.outcome == "completed"
    assert (settled.tokens.prompt, settled.tokens.completion, settled.tokens.reported) == (7, 3, True)
    assert (settled.cost, settled.price_version) == (7 * 2_000 + 3 * 10_000, PRICE.version)
    (settlement,) = one.limiter.settlements
    assert (settlement.tokens, settlement.cost, settlement.holds) == (10, settled.cost, admitted.holds)
    assert call.ticket is not None
    assert call.ticket.requests == one.limiter.state
    assert one.metered.in_flight == 0


async def test_what_is_asked_for_bounds_what_can_be_used(bench: Callable[..., Bench]) -> None:
    one = bench()
    await one.metered.open(chat(max_tokens=5, n=2))
    await one.metered.open(chat())
    limited, unlimited = one.limiter.demands
    prompt_bytes = 200
    assert 2 * 5 < limited.tokens_bound < 2 * 5 + prompt_bytes
    assert limited.cost_bound < PRICE.bound(prompt_bytes, 2 * 5, 0)
    assert 1000 < unlimited.tokens_bound < 1000 + prompt_bytes, "no more than the context"
    assert unlimited.tokens < 50 + prompt_bytes, "but so much is not expected"


async def test_money_is_reserved_for_all_attempts_that_may_be_billed_at_once(bench: Callable[..., Bench]) -> None:
    one = bench()
    await one.metered.open(chat(max_tokens=5))
    await one.metered.open(chat(2, max_tokens=5))
    usual, doubled = one.limiter.demands
    assert doubled.cost_bound == 2 * usual.cost_bound
    assert doubled.tokens_bound == usual.tokens_bound, "tokens are those of the answer"


@pytest.mark.parametrize("gone", [True, False])
async def test_what_the_loser_of_a_hedge_charges_is_in_the_cost_and_its_tokens_are_not(
    bench: Callable[..., Bench], gone: bool
) -> None:
    """Also when nobody knows how long its prompt was, and when the answer itself came to nothing."""

    async def hedged(call: Call) -> Stream:
        progress = call.progress
        progress.side_usage = (
            SideUsage("tiny/openai-1", Usage(prompt_tokens=11, completion_tokens=2), 1500),
            SideUsage("tiny/openai-1", Usage(), 0),
        )
        progress.attempts = (("tiny/openai-1", "hedged"),)
        if gone:
            raise asyncio.CancelledError
        return await answer(call)

    one = bench(hedged)
    call = chat()
    expected = 0 if gone else 7 * 2_000 + 3 * 10_000
    estimate = -(-call.body_bytes // 4)
    expected += 11 * 3_000 + 2 * 30_000 + 7_500_000 + estimate * 3_000
    with contextlib.suppress(asyncio.CancelledError):
        await one.metered.open(call)
    (settled,) = (record for record in one.records() if isinstance(record, Settled))
    assert settled.cost == expected
    assert [(side.deployment, side.tokens.prompt, side.tokens.completion) for side in settled.side] == [
        ("tiny/openai-1", 11, 2),
        ("tiny/openai-1", estimate, 0),
    ]
    assert {side.price_version for side in settled.side} == {OTHER_PRICE.version}
    assert settled.price_version == ("" if gone else PRICE.version)
    assert settled.tokens.total == (0 if gone else 10)
    (settlement,) = one.limiter.settlements
    assert (settlement.tokens, settlement.cost) == (settled.tokens.total, expected)


async def test_a_refused_call_reaches_nobody(bench: Callable[..., Bench]) -> None:
    async def unwanted(call: Call) -> Stream:
        raise AssertionError("it was refused")

    one = bench(unwanted)
    one.limiter.refusal = Refusal(limit=LIMIT, retry_after_s=1.5, requests=Meter(60, 0, 60))
    call = chat()
    with pytest.raises(HelixError) as caught:
        await one.metered.open(call)
    assert caught.value.kind is ErrorKind.RATE_LIMITED
    assert caught.value.retry_after_s == 1.5
    assert one.records() == []
    assert call.ticket is not None
    assert call.ticket.requests == Meter(60, 0, 60)
    assert one.metered.refused == {"requests_per_minute": 1}


@pytest.mark.parametrize("gone", [True, False])
async def test_what_fails_or_is_abandoned_is_settled_once(bench: Callable[..., Bench], gone: bool) -> None:
    async def fail(call: Call) -> Stream:
        call.progress.usage.completion_tokens = 2
        if gone:
            raise asyncio.CancelledError
        raise HelixError(ErrorKind.UPSTREAM_UNAVAILABLE, "It broke.")

    one = bench(fail)
    call = chat()
    with pytest.raises((HelixError, asyncio.CancelledError)):
        await one.metered.open(call)
    assert call.ticket is not None
    call.ticket.cancel()
    assert call.ticket.complete() is None
    settled = [record for record in one.records() if isinstance(record, Settled)]
    assert [record.outcome for record in settled] == ["cancelled" if gone else "failed"]
    assert settled[0].tokens.completion == 2, "what was made is paid"
    assert len(one.limiter.settlements) == 1


async def test_a_full_disk_refuses_and_gives_back(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    one = bench()

    def full(record: Admitted) -> int:
        raise HelixError(ErrorKind.STORAGE_FULL, "The disk is full.")

    monkeypatch.setattr(one.journal, "admit", full)
    with pytest.raises(HelixError) as caught:
        await one.metered.open(chat())
    assert caught.value.kind is ErrorKind.STORAGE_FULL
    assert [settlement.call_id for settlement in one.limiter.released] == ["a" * 32]
    assert one.metered.in_flight == 0


async def test_the_progress_of_a_stream_is_journalled(bench: Callable[..., Bench]) -> None:
    one = bench(policies=NO_POLICIES)
    call = chat(stream=True)
    await one.metered.open(call)
    call.progress.side_usage = (SideUsage("tiny/openai-1", Usage(prompt_tokens=11), 0),)
    progress = asyncio.create_task(one.metered.run())
    async with asyncio.timeout(5):
        while not any(isinstance(record, Progressed) for record in one.records()):
            await asyncio.sleep(0.005)
    progress.cancel()
    assert call.ticket is not None
    call.ticket.complete()
    _, progressed, settled = one.records()
    assert isinstance(progressed, Progressed), "unchanged progress is not written again"
    assert isinstance(settled, Settled)
    assert progressed.side == settled.side
    assert progressed.cost == settled.cost == 7 * 2_000 + 3 * 10_000 + 11 * 3_000
