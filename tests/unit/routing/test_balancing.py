"""Who gets a call: shares, loads, latencies, beginnings and sessions."""

from collections import Counter
from dataclasses import dataclass
from itertools import accumulate

from helixflow.core.call import Hints
from helixflow.core.clock import FakeClock
from helixflow.routing.balancing import Balancer
from helixflow.routing.latency import Latency
from helixflow.routing.rendezvous import pick_sticky
from helixflow.settings.serving import RoutingSettings
from tests.harness.routing import make_balancer, make_call

PROMPT = "A beginning that many share. " * 100


@dataclass
class Stool:
    seat_id: str
    in_flight: int = 0
    capacity: int = 4
    latency: float = 0.0
    whole: float = 0.0
    is_measured: bool = True

    def latency_s(self, now: float) -> float:
        return self.latency

    def whole_latency_s(self, now: float) -> float:
        return self.whole


def stools(*in_flight: int) -> list[Stool]:
    return [Stool(f"s{n}", flying) for n, flying in enumerate(in_flight)]


def choices(seats: list[Stool], count: int = 1000, *, shares: list[float] | None = None) -> Counter[str]:
    balancer = make_balancer(RoutingSettings(), FakeClock())
    call = make_call()
    return Counter(balancer.choose(seats, call, "m", shares=shares).seat_id for _ in range(count))


def test_of_two_the_less_loaded_one_is_taken() -> None:
    assert choices(stools(2, 1)) == {"s1": 1000}
    assert choices([Stool("s0", 4, capacity=8), Stool("s1", 3, capacity=4)]) == {"s0": 1000}


def test_the_busiest_of_many_gets_nothing_and_equals_share() -> None:
    counted = choices(stools(0, 0, 0, 0, 3), 4000)
    assert counted["s4"] == 0
    assert all(850 < counted[f"s{n}"] < 1150 for n in range(4))


def test_the_slower_one_is_left_more_idle_but_not_unused() -> None:
    slow, fast = Stool("slow", latency=2.0), Stool("fast", latency=0.1)
    assert choices([slow, fast])["fast"] == 1000
    fast.in_flight = 3
    assert choices([slow, fast])["slow"] > 300, "as good as four times as much to do"
    fast.in_flight, fast.latency = 1, 0.0
    assert choices([slow, fast])["slow"] == 1000, "it was never measured"


def test_whole_answers_are_compared_only_with_whole_answers() -> None:
    assert choices([Stool("slow", whole=9.0), Stool("fast", whole=3.0)])["fast"] == 1000
    slow, fast = Stool("slow", latency=2.0, whole=1.0), Stool("fast", latency=0.1, whole=9.0)
    assert choices([slow, fast])["fast"] == 1000, "the time to the first token says more"
    fast.latency = slow.whole = 0.0
    assert choices([slow, fast])["fast"] > 300, "nothing that they have in common is known"


def test_weights_are_kept_while_nobody_is_overrun() -> None:
    shares = list(accumulate((90.0, 9.0, 1.0)))
    counted = choices(stools(0, 0, 0), 10_000, shares=shares)
    assert 8850 < counted["s0"] < 9150
    assert 800 < counted["s1"] < 1000
    assert 60 < counted["s2"] < 150
    assert choices(stools(90, 9, 1), 10_000, shares=shares)["s0"] > 8850, "that is its share"
    assert choices(stools(90, 0, 0), 10_000, shares=shares)["s0"] < 8400, "the others have nothing to do"


def varied(balancer: Balancer, seats: list[Stool], number: int) -> None:
    """Calls of others: what comes to all seats does not begin alike."""
    for other in range(8 * len(seats)):
        balancer.choose(seats, make_call(prompt=f"{number} {other} {PROMPT}"), "m")


def test_a_known_beginning_goes_where_it_went_while_that_is_not_much_busier() -> None:
    balancer = make_balancer(RoutingSettings(), FakeClock())
    seats = stools(0, 0, 0, 0)
    call = make_call(prompt=PROMPT)
    varied(balancer, seats, 1)
    first = balancer.choose(seats, call, "m")
    for number in range(5):
        varied(balancer, seats, number)
        assert balancer.choose(seats, call, "m") is first
    first.in_flight = 3
    assert balancer.choose(seats, call, "m") is first, "it is worth the wait"
    little = make_call(prompt=PROMPT[:300] + "else " * 300)
    assert balancer.choose(seats, little, "m") is not first, "not for so little"
    varied(balancer, seats, 9)
    first.in_flight = 4
    elsewhere = balancer.choose(seats, call, "m")
    assert elsewhere is not first
    assert balancer.choose(seats, call, "m") is elsewhere, "now it is known there"


def test_a_beginning_that_all_share_is_spread() -> None:
    balancer = make_balancer(RoutingSettings(), FakeClock())
    seats, call = stools(0, 0), make_call(prompt=PROMPT)
    for _ in range(20):
        balancer.choose(seats, call, "m")
    for seat, other in (seats, seats[::-1]):
        seat.in_flight, other.in_flight = 2, 1
        assert balancer.choose(seats, call, "m") is other


def test_nothing_is_expected_of_a_seat_that_is_gone() -> None:
    balancer = make_balancer(RoutingSettings(), FakeClock())
    seats = stools(1, 0)
    call = make_call(prompt=PROMPT)
    assert balancer.choose(seats, call, "m") is seats[1]
    assert balancer.choose(seats[:1], call, "m") is seats[0]
    balancer.forget("s0")
    assert balancer.choose(seats, call, "m") is seats[1]


def test_without_affinity_beginnings_do_not_matter() -> None:
    balancer = make_balancer(RoutingSettings(), FakeClock())
    seats, call = stools(0, 0, 0, 0), make_call(prompt=PROMPT)
    counted = Counter(balancer.choose(seats, call, "m", affinity=False).seat_id for _ in range(400))
    assert min(counted.values()) > 50


def test_a_session_stays_whatever_its_prompts_and_all_gateways_begin_alike() -> None:
    seats = stools(0, 0, 0, 0)
    gateways = [make_balancer(RoutingSettings(), FakeClock(), seed=seed) for seed in (1, 2)]
    used = set()
    for session in range(40):
        hints = Hints(session=f"session-{session}")
        chosen = {
            gateway.choose(seats, make_call(prompt=prompt, hints=hints), "m").seat_id
            for gateway in gateways
            for prompt in ("Hi", PROMPT, "Bye")
        }
        assert len(chosen) == 1
        used |= chosen
    assert used == {"s0", "s1", "s2", "s3"}


def test_a_session_moves_when_its_seat_is_overrun_and_stays_there() -> None:
    balancer = make_balancer(RoutingSettings(), FakeClock())
    seats = stools(0, 0, 0)
    call = make_call(hints=Hints(session="s"))
    first = balancer.choose(seats, call, "m")
    first.in_flight = 5
    second = balancer.choose(seats, call, "m")
    assert second is not first
    first.in_flight = 0
    assert balancer.choose(seats, call, "m") is second


def test_sticky_choices_follow_weights_and_move_as_few_keys_as_must() -> None:
    seats = [Stool(name) for name in ("m/llama_cpp-0", "m/llama_cpp-1", "m/openai-2", "m/openai-3")]
    keys = [f"user {n}" for n in range(8000)]
    even = {key: pick_sticky(key, seats).seat_id for key in keys}
    assert all(0.22 < count / len(keys) < 0.28 for count in Counter(even.values()).values())
    without = {key: pick_sticky(key, seats[:3]).seat_id for key in keys}
    assert all(without[key] == even[key] for key in keys if even[key] != "m/openai-3")
    weighted = Counter(pick_sticky(key, seats, [60.0, 90.0, 99.0, 100.0]).seat_id for key in keys)
    for seat, share in zip(seats, (0.6, 0.3, 0.09, 0.01), strict=True):
        assert abs(weighted[seat.seat_id] / len(keys) - share) < 0.02


def test_sticky_choices_are_the_same_in_every_process() -> None:
    seats = [Stool(f"m/d{n}") for n in range(10)]
    expected = ["m/d0", "m/d8", "m/d5", "m/d5", "m/d2", "m/d8"]
    assert [pick_sticky(f"user {n}", seats).seat_id for n in range(6)] == expected


def test_a_latency_follows_what_is_measured_and_is_forgotten() -> None:
    latency = Latency(10)
    assert latency.estimate(0) == 0
    latency.measure(1.0, 0)
    assert latency.estimate(0) == 1.0
    latency.measure(2.0, 10)
    assert latency.estimate(10) == 1.5
    for _ in range(40):
        latency.measure(5.0, 10)
    assert 4.8 < latency.estimate(10) < 5.0, "many at once outweigh what was"
    assert abs(latency.estimate(20) - latency.estimate(10) / 2) < 1e-9
    assert latency.estimate(10_000) < 0.001
