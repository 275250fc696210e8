"""Who does far worse than its tier is taken out of it, as long as enough are left."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixflow.core.clock import FakeClock
from helixflow.routing.health import Health
from helixflow.routing.outliers import Outliers
from helixflow.settings.serving import RoutingSettings
from tests.harness.virtual_time import VirtualTimeLoop


def make_health(*, succeeded: int = 0, failed: int = 0, latency_s: float = 0.1) -> Health:
    """One that has served so many calls, and never failed thrice in a row."""
    health = Health(RoutingSettings(ejection_failures=1000), FakeClock())
    for _ in range(succeeded):
        health.succeed(health.begin(), latency_s)
    for _ in range(failed):
        health.fail(health.begin())
    return health


def review(*tier: Health, percent: int = 50) -> list[int]:
    ejected = Outliers(RoutingSettings(max_ejected_percent=percent)).review(tier)
    assert all(health.is_ejected for health in ejected)
    return [index for index, health in enumerate(tier) if any(health is one for one in ejected)]


def test_who_fails_at_times_is_ejected() -> None:
    assert review(make_health(succeeded=100), make_health(succeeded=60, failed=40)) == [1]


def test_trouble_of_all_is_nobodys_fault() -> None:
    assert review(*(make_health(succeeded=60, failed=40) for _ in range(4))) == []


def test_who_is_far_slower_is_ejected() -> None:
    assert review(*(make_health(succeeded=50, latency_s=s) for s in (0.2, 2.0, 0.2, 0.3))) == [1]
    assert review(*(make_health(succeeded=50, latency_s=s) for s in (2.0, 4.0, 2.5, 3.0))) == []
    assert review(*(make_health(succeeded=50, latency_s=s) for s in (0.01, 0.2))) == [], "that hurts nobody"


def test_a_few_calls_say_nothing() -> None:
    assert review(make_health(succeeded=100), make_health(failed=10)) == []
    assert review(make_health(succeeded=10), make_health(failed=100)) == [], "nor about the others"


@pytest.mark.parametrize(("percent", "expected"), [(0, []), (25, [3]), (50, [2, 3]), (100, [2, 3])])
def test_no_more_than_the_settings_allow_the_worst_first(percent: int, expected: list[int]) -> None:
    tier = [
        make_health(succeeded=400),
        make_health(succeeded=400),
        make_health(succeeded=60, failed=40),
        make_health(succeeded=30, failed=70),
    ]
    assert review(*tier, percent=percent) == expected


def test_those_that_are_out_already_count() -> None:
    out = make_health(succeeded=100)
    out.eject()
    assert review(out, make_health(succeeded=100), make_health(succeeded=50, failed=50)) == []


@given(
    st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100), st.floats(0, 10), st.booleans()), max_size=12),
    st.integers(0, 100),
)
def test_the_last_one_that_serves_is_never_ejected(figures: list[tuple[int, int, float, bool]], percent: int) -> None:
    tier = [make_health(succeeded=s, failed=f, latency_s=latency_s) for s, f, latency_s, _ in figures]
    for health, (*_, out) in zip(tier, figures, strict=True):
        if out:
            health.eject()
    serving = sum(not health.is_ejected for health in tier)
    ejected = len(review(*tier, percent=percent))
    assert not ejected or (ejected < serving and len(tier) - serving + ejected <= len(tier) * percent / 100)


def test_what_is_long_ago_is_forgotten() -> None:
    def scenario_tier() -> list[tuple[str, Health]]:
        return [("a", good), ("b", bad)]

    good, bad = make_health(succeeded=100), make_health(succeeded=19)

    async def scenario() -> None:
        reviewing = asyncio.create_task(Outliers(RoutingSettings()).run(lambda: [scenario_tier()]))
        await asyncio.sleep(60)
        for _ in range(18):
            bad.fail(bad.begin())
        await asyncio.sleep(10)
        assert not bad.is_ejected
        for _ in range(20):
            good.succeed(good.begin(), 0.1)
            bad.fail(bad.begin())
        await asyncio.sleep(2)
        assert bad.is_ejected
        assert not good.is_ejected
        reviewing.cancel()

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(scenario())
