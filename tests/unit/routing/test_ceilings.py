"""A provider's limits are kept, before it has to say so and after."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixflow.core.call import Call, Operation
from helixflow.core.capacity import ProviderLimits
from helixflow.core.clock import FakeClock
from helixflow.core.principal import Principal, PrincipalKind
from helixflow.dialects.openai_chat import parse_chat
from helixflow.dialects.openai_embeddings import parse_embedding
from helixflow.dialects.validation import decode_fields
from helixflow.routing.ceilings import WINDOW_S, Ceiling, expected_tokens
from helixflow.settings.deployments import RoutedDeployment


def make_ceiling(
    clock: FakeClock, *, gateways: int = 1, limits: ProviderLimits | None = None, **ceilings: int
) -> Ceiling:
    return Ceiling(RoutedDeployment(**ceilings), clock, gateways=gateways, limits=limits)


def test_without_ceilings_nothing_is_asked() -> None:
    ceiling = make_ceiling(FakeClock())
    assert not ceiling.is_active
    assert not ceiling.counts_tokens
    assert ceiling.wait_s(10**9) == 0.0


def test_places_are_given_back() -> None:
    ceiling = make_ceiling(FakeClock(), max_concurrency=2)
    entry = ceiling.enter(0)
    assert ceiling.wait_s(0) == 0.0
    ceiling.enter(0)
    assert ceiling.wait_s(0) > 0
    ceiling.leave(entry, 0)
    assert ceiling.wait_s(0) == 0.0


@pytest.mark.parametrize(("ceiling", "gateways", "share"), [(10, 3, 3), (2, 3, 1)])
def test_each_gateway_takes_its_share(ceiling: int, gateways: int, share: int) -> None:
    clock = FakeClock()
    one = make_ceiling(clock, gateways=gateways, requests_per_minute=ceiling)
    entered = 0
    while not one.wait_s(0):
        one.enter(0)
        entered += 1
    assert entered == share


def test_tokens_are_corrected_when_they_are_known() -> None:
    clock = FakeClock()
    ceiling = make_ceiling(clock, tokens_per_minute=1000)
    entry = ceiling.enter(800)
    assert ceiling.wait_s(300) > 0
    clock.advance(5)
    ceiling.leave(entry, 800, 100)
    assert ceiling.wait_s(900) == 0.0
    assert ceiling.wait_s(901) > 0
    ceiling.leave(ceiling.enter(100), 100, 700)
    assert ceiling.wait_s(201) > 0
    clock.advance(WINDOW_S + 1)
    assert ceiling.wait_s(1000) == 0.0, "what was given back is not given back twice"
    assert ceiling.wait_s(5000) == 0.0, "more than the ceiling goes when nothing else does"
    ceiling.enter(5000)
    assert ceiling.wait_s(1) > 0


def test_what_is_given_back_late_is_lost() -> None:
    clock = FakeClock()
    ceiling = make_ceiling(clock, tokens_per_minute=1000)
    entry = ceiling.enter(1000)
    clock.advance(2 * WINDOW_S)
    ceiling.enter(1000)
    ceiling.leave(entry, 1000, 0)
    assert ceiling.wait_s(1) > 0


def test_other_ceilings_count_what_was_let_in_before_and_what_leaves_then() -> None:
    clock = FakeClock()
    before = make_ceiling(clock, gateways=2, max_concurrency=4, requests_per_minute=20)
    entry = before.enter(0)
    before.enter(0)
    after = before.changed(RoutedDeployment(max_concurrency=4, requests_per_minute=6, tokens_per_minute=100))
    assert after.wait_s(0) > 0
    before.leave(entry, 0)
    assert after.wait_s(0) == 0.0
    after.leave(after.enter(0), 0)
    assert after.wait_s(0) > 1, "three in this minute"
    assert before.wait_s(0) == 0.0


def test_a_429_is_heeded_until_its_time_is_over() -> None:
    clock = FakeClock()
    ceiling = make_ceiling(clock)
    ceiling.refuse(7)
    ceiling.refuse(3)
    assert ceiling.is_active
    assert ceiling.wait_s(0) == 7
    clock.advance(7)
    assert ceiling.wait_s(0) == 0.0


def test_what_the_provider_says_is_left_is_counted_down_and_comes_back() -> None:
    clock = FakeClock()
    limits = ProviderLimits()
    ceiling = make_ceiling(clock, limits=limits)
    assert not ceiling.is_active, "it has not said anything yet"
    assert ceiling.wait_s(10**6) == 0.0
    limits.are_known = True
    assert ceiling.is_active
    limits.requests_left, limits.requests_a_second, limits.requests_at = 2, 0.5, clock.monotonic()
    limits.tokens_left, limits.tokens_a_second, limits.tokens_at = 500, 100, clock.monotonic()
    assert ceiling.wait_s(501) == pytest.approx(0.01)
    ceiling.enter(100)
    ceiling.enter(100)
    assert ceiling.wait_s(100) == pytest.approx(2)
    clock.advance(2)
    assert ceiling.wait_s(500) == 0.0
    limits.requests_left, limits.requests_a_second = 0, 0
    assert ceiling.wait_s(0) > 0


@given(
    st.integers(1, 20),
    st.integers(1, 2000),
    st.lists(st.tuples(st.floats(0, 20), st.integers(0, 400)), max_size=60),
)
def test_in_no_minute_is_more_asked_for_and_waiting_as_told_is_enough(
    requests: int, tokens: int, calls: list[tuple[float, int]]
) -> None:
    clock = FakeClock()
    ceiling = make_ceiling(clock, requests_per_minute=requests, tokens_per_minute=tokens)
    entered: list[tuple[float, int]] = []
    for pause_s, cost in calls:
        clock.advance(pause_s)
        if wait_s := ceiling.wait_s(cost):
            assert wait_s <= WINDOW_S + 1
            clock.advance(wait_s + 1e-6)
            assert ceiling.wait_s(cost) == 0.0
        ceiling.enter(cost)
        entered.append((clock.monotonic(), cost))
    for begin, _ in entered:
        minute = [cost for at, cost in entered if begin <= at < begin + WINDOW_S]
        assert len(minute) <= requests
        assert sum(minute) <= max(tokens, *minute, 0), "what is more than the ceiling goes alone"


def chat(**fields: object) -> Call:
    body = msgspec.json.encode({"model": "m", "messages": [{"role": "user", "content": "x" * 400}], **fields})
    principal = Principal(PrincipalKind.KEY, "key_1", "one", "org", "proj")
    return Call(
        "c", "r", principal, Operation.CHAT, "m", decode_fields(body), parse_chat(body), True, False, 0, len(body)
    )


def test_what_a_call_is_expected_to_use() -> None:
    said, unsaid = expected_tokens(chat(max_tokens=50)), expected_tokens(chat())
    assert 150 < said < 200
    assert unsaid > said
    body = b'{"model":"m","input":"' + b"x" * 400 + b'"}'
    call = chat()
    call.params, call.operation, call.body_bytes = parse_embedding(body), Operation.EMBEDDINGS, len(body)
    assert 100 < expected_tokens(call) < 110
