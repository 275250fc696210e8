"""The scripts against a simple model, step by step, in a real Redis."""

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helixflow.metering.admission import Refusal
from helixflow.metering.policies import Budget, Limit, Metric, Period, Policies, Scope, Unit
from tests.harness.redis import RedisServer
from tests.harness.spending import ORGANISATION, Ledger, Spender

CAPS = {"small": 1000, "large": 2500}
PARALLEL = 5
# Tokens a day: so slow that nothing comes back while a test runs.
TOKENS = 5000

Step = tuple[str, int, int, int]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["admit", "admit", "admit", "settle", "settle", "release"]),
        st.integers(0, 1),
        st.integers(0, 700),
        st.integers(0, 9),
    ),
    max_size=40,
)


class Model:
    """What two gateways have taken together."""

    def __init__(self) -> None:
        self.running = 0
        self.tokens = 0
        self.spent = dict.fromkeys(CAPS, 0)
        self.reserved = dict.fromkeys(CAPS, 0)

    def fits(self, amount: int, names: tuple[str, ...]) -> bool:
        return (
            self.running < PARALLEL
            and self.tokens + amount <= TOKENS
            and all(self.spent[name] + self.reserved[name] + amount <= CAPS[name] for name in names)
            and all(self.spent[name] < CAPS[name] for name in names)
        )

    def take(self, amount: int, names: tuple[str, ...]) -> None:
        self.running += 1
        self.tokens += amount
        for name in names:
            self.reserved[name] += amount

    def end(self, amount: int, used: int, names: tuple[str, ...]) -> None:
        self.running -= 1
        # What was overdrawn is owed.
        self.tokens += used - amount
        for name in names:
            self.reserved[name] -= amount
            self.spent[name] += used


def policies(names: tuple[str, ...]) -> Policies:
    scope, subject = Scope.ORGANISATION, ORGANISATION
    return Policies(
        (
            Limit("p", ORGANISATION, scope, subject, "", Metric.PARALLEL_REQUESTS, PARALLEL, 0),
            Limit("t", ORGANISATION, scope, subject, "", Metric.TOKENS_PER_DAY, 1, TOKENS),
        ),
        tuple(Budget(name, ORGANISATION, scope, subject, Unit.MONEY, Period.TOTAL, CAPS[name]) for name in names),
    )


BOTH, LARGE = policies(("small", "large")), policies(("large",))


@pytest.fixture
def server(redis_server: RedisServer) -> Iterator[RedisServer]:
    redis_server.start()
    yield redis_server


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_two_gateways_do_as_the_model_does(server: RedisServer, steps: list[Step]) -> None:
    server.flush()
    asyncio.run(follow(server, steps))


async def follow(server: RedisServer, steps: list[Step]) -> None:
    model, ledger = Model(), Ledger()
    no_lease = server.settings(lease_per_mille=0)
    spenders = [Spender.create(no_lease, ledger) for _ in range(2)]
    running: list[tuple[Spender, str, int, tuple[str, ...]]] = []
    async with spenders[0], spenders[1]:
        # Both budgets are known from here on.
        spenders[0].release(await spenders[0].admit(BOTH))
        await spenders[0].limiter.close()
        for action, which, amount, pick in steps:
            if action == "admit":
                names = ("small", "large") if pick % 2 else ("large",)
                fits = model.fits(amount, names)
                try:
                    call_id = await spenders[which].admit(BOTH if pick % 2 else LARGE, tokens=amount, cost=amount)
                except Refusal:
                    assert not fits
                else:
                    assert fits
                    model.take(amount, names)
                    running.append((spenders[which], call_id, amount, names))
            elif running:
                spender, call_id, amount_held, names = running.pop(pick % len(running))
                if action == "release":
                    spender.release(call_id)
                    model.end(amount_held, 0, names)
                else:
                    # Now and then more than was reserved.
                    spender.settle(call_id, tokens=amount, cost=amount)
                    model.end(amount_held, amount, names)
                await spender.limiter.close()
        with server.client() as client:
            epoch = client.hget("hf:epoch", "id").decode()  # type: ignore[union-attr]
            for name in CAPS:
                spent, reserved = client.hmget(f"hf:{epoch}:{{{ORGANISATION}}}:b:{name}:0", "spent", "reserved")  # type: ignore[misc]
                assert (int(spent or 0), int(reserved or 0)) == (model.spent[name], model.reserved[name])
            assert int(client.get(f"hf:{epoch}:{{{ORGANISATION}}}:p:p") or 0) == model.running  # type: ignore[arg-type]
