"""Two attempts at one stream: one wins, one is paid for, none is left over."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import pytest

from helixflow.core.call import Call, Operation, Stream, Usage
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.principal import Principal, PrincipalKind
from helixflow.routing.hedging import HEDGED, open_hedged
from tests.harness.virtual_time import VirtualTimeLoop

AFTER_S = 1.0
NEVER_S = 1e6


def run(scenario: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(scenario)


def make_call(*, stream: bool = True) -> Call:
    principal = Principal(PrincipalKind.KEY, "key_1", "one", "org", "proj")
    return Call("c" * 32, "r", principal, Operation.CHAT, "m", {}, msgspec.defstruct("P", [])(), stream, False, 60)


class Answer:
    def __init__(self, deployment: str) -> None:
        self.deployment = deployment
        self.closed = False

    async def read(self) -> bytes:
        raise HelixError(ErrorKind.UPSTREAM_INVALID, "It broke off.")

    def close(self) -> None:
        self.closed = True


class Deployment:
    """Has content after `first_s`, or fails then; uses 10 prompt tokens once it has begun, after `queue_s`."""

    def __init__(
        self, name: str, first_s: float, *, fails: ErrorKind | None = None, queue_s: float = 0, deaf_s: float = 0
    ) -> None:
        self.name = name
        self.first_s = first_s
        self.fails = fails
        self.queue_s = queue_s
        self.deaf_s = deaf_s
        self.cancelled = False
        self.answers: list[Answer] = []

    async def open(self, call: Call) -> Stream:
        progress = call.progress
        progress.deployment = self.name
        try:
            await asyncio.sleep(self.queue_s)
            progress.engine_began_at = time.perf_counter()
            progress.usage = Usage(prompt_tokens=10)
            await asyncio.sleep(self.first_s - self.queue_s)
        except asyncio.CancelledError:
            self.cancelled = True
            await asyncio.sleep(self.deaf_s)
            raise
        if self.fails is not None:
            raise HelixError(self.fails, "no")
        progress.usage.completion_tokens = 1
        self.answers.append(Answer(self.name))
        return self.answers[-1]

    @property
    def is_over(self) -> bool:
        return self.cancelled or all(answer.closed for answer in self.answers)


class Race:
    """A call with a first deployment and those that are there beside it."""

    def __init__(self, first: Deployment, *others: Deployment, stream: bool = True) -> None:
        self.call = make_call(stream=stream)
        self.first = first
        self.others = list(others)
        self.asked = 0

    async def open(self) -> Stream:
        return await open_hedged(
            self.call,
            self.first,
            after_s=AFTER_S,
            open_one=lambda call, deployment: deployment.open(call),
            next_target=self._next,
            tries_elsewhere=lambda error: error.kind is not ErrorKind.INVALID_REQUEST,
        )

    def _next(self) -> Deployment | None:
        self.asked += 1
        return self.others.pop(0) if self.others else None

    @property
    def side(self) -> list[tuple[str, int, int]]:
        return [
            (side.deployment, side.usage.prompt_tokens, side.usage.completion_tokens)
            for side in self.call.progress.side_usage
        ]


def test_who_is_quick_is_not_hedged() -> None:
    async def scenario() -> None:
        race = Race(Deployment("a", AFTER_S / 2), Deployment("b", 0))
        progress = race.call.progress
        assert await race.open() is race.first.answers[0]
        assert race.asked == 0
        assert race.call.progress is progress
        assert (progress.attempts, progress.side_usage) == ((), ())

    run(scenario())


def test_the_second_wins_and_the_first_is_cancelled_and_paid_for() -> None:
    async def scenario() -> None:
        slow, quick = Deployment("a", NEVER_S), Deployment("b", 0.5)
        race = Race(slow, quick)
        stream = await race.open()
        assert stream is quick.answers[0]
        assert asyncio.get_running_loop().time() == pytest.approx(AFTER_S + 0.5)
        assert slow.cancelled
        progress = race.call.progress
        assert (progress.deployment, progress.usage.completion_tokens) == ("b", 1)
        assert progress.attempts == (("a", HEDGED),)
        assert race.side == [("a", 10, 0)]
        assert not quick.answers[0].closed
        # From here on it is an ordinary stream: who reads it hears of its end, and closes it.
        with pytest.raises(HelixError):
            await stream.read()
        stream.close()
        assert quick.is_over
        assert len(asyncio.all_tasks()) == 1

    run(scenario())


def test_the_first_wins_after_all() -> None:
    async def scenario() -> None:
        first, second = Deployment("a", AFTER_S + 0.5), Deployment("b", NEVER_S)
        race = Race(first, second)
        progress = race.call.progress
        assert await race.open() is first.answers[0]
        assert second.cancelled
        assert race.call.progress is progress
        assert progress.attempts == (("b", HEDGED),)
        assert race.side == [("b", 10, 0)]

    run(scenario())


def test_who_only_waited_for_a_slot_costs_nothing() -> None:
    async def scenario() -> None:
        race = Race(Deployment("a", NEVER_S, queue_s=NEVER_S), Deployment("b", 0.5))
        await race.open()
        assert race.call.progress.attempts == (("a", HEDGED),)
        assert race.side == []

    run(scenario())


def test_of_two_at_the_same_moment_one_is_closed_and_paid_for_with_its_content() -> None:
    async def scenario() -> None:
        first, second = Deployment("a", AFTER_S), Deployment("b", 0)
        first.first_s = AFTER_S + 0.25
        second.first_s = 0.25
        race = Race(first, second)
        stream = await race.open()
        assert stream is first.answers[0]
        await asyncio.sleep(0)
        assert second.is_over
        assert not first.answers[0].closed
        assert len(race.side) == 1

    run(scenario())


def test_a_loser_that_does_not_listen_holds_nobody_up_and_is_closed_when_it_answers() -> None:
    async def scenario() -> None:
        stubborn = Deployment("a", NEVER_S, deaf_s=30)
        race = Race(stubborn, Deployment("b", 0.5))
        await race.open()
        assert asyncio.get_running_loop().time() < AFTER_S + 1
        assert race.side == [("a", 10, 0)]

    run(scenario())


@pytest.mark.parametrize("first_fails", [True, False])
def test_when_one_fails_the_other_goes_on(first_fails: bool) -> None:
    async def scenario() -> None:
        fault = ErrorKind.UPSTREAM_UNAVAILABLE
        if first_fails:
            race = Race(Deployment("a", AFTER_S + 0.5, fails=fault), Deployment("b", 5))
        else:
            race = Race(Deployment("a", AFTER_S + 5), Deployment("b", 0.5, fails=fault))
        winner = "b" if first_fails else "a"
        stream = await race.open()
        assert isinstance(stream, Answer)
        assert stream.deployment == race.call.progress.deployment == winner
        assert race.call.progress.attempts == (("a" if first_fails else "b", "upstream_unavailable"),)
        assert race.side == [], "what failed is paid by nobody"

    run(scenario())


@pytest.mark.parametrize("first_is_last", [True, False])
def test_when_both_fail_the_last_failure_is_the_callers(first_is_last: bool) -> None:
    async def scenario() -> None:
        race = Race(
            Deployment("a", AFTER_S + (2 if first_is_last else 1), fails=ErrorKind.LOADING),
            Deployment("b", 1 if first_is_last else 2, fails=ErrorKind.OVERLOADED),
        )
        progress = race.call.progress
        race.first.first_s += 0.125
        with pytest.raises(HelixError) as caught:
            await race.open()
        last, other = ("a", ("b", "overloaded")) if first_is_last else ("b", ("a", "model_loading"))
        assert caught.value.kind is (ErrorKind.LOADING if first_is_last else ErrorKind.OVERLOADED)
        assert race.call.progress is progress
        assert (progress.deployment, progress.attempts) == (last, (other,))
        assert race.side == []

    run(scenario())


def test_a_failure_before_the_time_is_up_is_left_to_the_retries() -> None:
    async def scenario() -> None:
        race = Race(Deployment("a", 0.5, fails=ErrorKind.LOADING), Deployment("b", 0))
        with pytest.raises(HelixError):
            await race.open()
        assert race.asked == 0

    run(scenario())


def test_what_nobody_else_can_better_ends_both() -> None:
    async def scenario() -> None:
        slow, refusing = Deployment("a", NEVER_S), Deployment("b", 0.5, fails=ErrorKind.INVALID_REQUEST)
        race = Race(slow, refusing)
        with pytest.raises(HelixError) as caught:
            await race.open()
        assert caught.value.kind is ErrorKind.INVALID_REQUEST
        assert slow.cancelled
        progress = race.call.progress
        assert (progress.deployment, progress.attempts) == ("b", (("a", HEDGED),))
        assert race.side == [("a", 10, 0)]

    run(scenario())


@pytest.mark.parametrize("after_s", [AFTER_S / 2, AFTER_S + 0.5])
def test_a_client_that_leaves_ends_both(after_s: float) -> None:
    async def scenario() -> None:
        first, second = Deployment("a", NEVER_S), Deployment("b", NEVER_S)
        race = Race(first, second)
        opening = asyncio.create_task(race.open())
        await asyncio.sleep(after_s)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        assert first.cancelled
        assert second.cancelled is (after_s > AFTER_S)
        assert race.call.progress.deployment == "a"
        assert race.side == ([("b", 10, 0)] if after_s > AFTER_S else [])
        assert len(asyncio.all_tasks()) == 1

    run(scenario())


@pytest.mark.parametrize("turns", range(6))
@pytest.mark.parametrize("first_s", [AFTER_S / 2, AFTER_S + 0.5, NEVER_S])
def test_a_client_that_leaves_in_the_turn_of_the_first_content_leaves_no_stream_open(
    turns: int, first_s: float
) -> None:
    async def scenario() -> None:
        first, second = Deployment("a", first_s), Deployment("b", 0.5)
        race = Race(first, second)
        opening = asyncio.create_task(race.open())
        await asyncio.sleep(min(first_s, AFTER_S + 0.5))
        for _ in range(turns):
            await asyncio.sleep(0)
        opening.cancel()
        try:
            (await opening).close()
        except asyncio.CancelledError:
            pass  # it came in time
        await asyncio.sleep(1)
        assert first.is_over
        assert second.is_over
        assert len(asyncio.all_tasks()) == 1

    run(scenario())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Race(Deployment("a", AFTER_S + 1)),  # nobody else is there, or the budget is spent
        lambda: Race(Deployment("a", AFTER_S + 1), Deployment("b", 0), stream=False),
    ],
)
def test_without_another_or_a_stream_there_is_one_attempt(make: Callable[[], Race]) -> None:
    async def scenario() -> None:
        race = make()
        assert await race.open() is race.first.answers[0]
        assert race.call.progress.attempts == ()
        assert race.asked <= 1

    run(scenario())


def test_no_more_than_one_loser_is_paid_for_a_call() -> None:
    async def scenario() -> None:
        race = Race(Deployment("a", NEVER_S), Deployment("b", 0.5, fails=ErrorKind.INVALID_REQUEST))
        with pytest.raises(HelixError):
            await race.open()
        race.first = Deployment("c", AFTER_S + 1)
        race.others = [Deployment("d", 0)]
        assert await race.open() is race.first.answers[0]
        assert race.side == [("a", 10, 0)]

    run(scenario())


def test_a_fault_of_ours_is_not_hidden() -> None:
    async def scenario() -> None:
        slow = Deployment("a", NEVER_S)

        class Faulty(Deployment):
            async def open(self, call: Call) -> Stream:
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await Race(slow, Faulty("b", 0)).open()
        assert slow.cancelled

    run(scenario())
