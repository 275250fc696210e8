"""Who may be loaded, who has to leave for it, and what is said when nothing helps."""

from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixflow.pool.memory import Device, Limits, Need, gpu_limits, ram_limit
from helixflow.pool.memory_admission import Evict, Fits, Refuse, Resident, Wait, place, plan_admission

LIMITS = Limits(100)
NOW = 1000.0


def decide(wanted: int, *loaded: Resident, evict: bool = True) -> Fits | Evict | Wait | Refuse:
    return plan_admission(Need(wanted), loaded, LIMITS, NOW, min_residence_s=10, evict=evict)


def test_what_fits_disturbs_nobody() -> None:
    assert decide(40, Resident("a", 60)) == Fits({})


def test_the_least_recently_used_leaves() -> None:
    a, b = Resident("a", 50, last_used=30), Resident("b", 50, last_used=20)
    assert decide(50, a, b) == Evict(("b",))


def test_no_more_leave_than_must() -> None:
    """The oldest is too small to help, and is spared once the next one suffices alone."""
    small, large = Resident("small", 10, last_used=1), Resident("large", 80, last_used=2)
    assert decide(70, small, large) == Evict(("large",))
    assert decide(95, small, large) == Evict(("small", "large"))


def test_memory_that_is_being_freed_is_waited_for() -> None:
    assert isinstance(decide(50, Resident("a", 60, leaving=True), Resident("b", 40, last_used=1)), Wait)


def test_busy_ones_are_waited_for_and_never_leave() -> None:
    answer = decide(50, Resident("a", 60, busy=True))
    assert isinstance(answer, Wait)
    assert answer.until is None
    assert "60 B busy" in answer.reason


def test_nobody_leaves_before_its_shortest_residence() -> None:
    fresh = Resident("fresh", 60, since=NOW - 4, last_used=1)
    assert decide(50, fresh) == Wait(NOW + 6, "waits until fresh has been loaded for its shortest time")
    older = Resident("older", 40, since=NOW - 50, last_used=2)
    assert decide(40, fresh, older) == Evict(("older",)), "another one has been there for long enough"


def test_pinned_ones_are_in_the_way_for_good() -> None:
    answer = decide(50, Resident("a", 60, pinned=True), Resident("b", 10))
    assert answer == Refuse("needs 50 B of RAM, the limit is 100 B, of which 60 B pinned")


def test_what_is_larger_than_everything_is_refused_with_what_it_is_made_of() -> None:
    need = Need(150, parts={"weights": 100, "KV cache": 50, "prompt cache": 0})
    answer = plan_admission(need, [Resident("a", 60)], LIMITS, NOW, min_residence_s=0)
    assert answer == Refuse("needs 150 B of RAM (weights 100 B, KV cache 50 B), the limit is 100 B")


def test_a_superseded_one_goes_first_and_at_once() -> None:
    old = Resident("old", 60, busy=True, pinned=True, superseded=True, since=NOW, last_used=NOW)
    assert decide(50, old, Resident("idle", 40)) == Evict(("old",))


def test_nobody_leaves_for_a_further_replica_of_itself() -> None:
    assert isinstance(decide(50, Resident("a", 60, wanting=True)), Refuse)


def test_a_load_that_may_not_evict_takes_only_what_is_free() -> None:
    answer = decide(50, Resident("a", 60), evict=False)
    assert answer == Refuse(
        "no room without unloading another model: needs 50 B of RAM, the limit is 100 B, of which 60 B idle"
    )


def test_other_models_are_not_blamed_for_what_they_are_not_in_the_way_of() -> None:
    assert decide(150, evict=False) == Refuse("needs 150 B of RAM, the limit is 100 B")
    assert decide(150, Resident("a", 60), evict=False) == Refuse("needs 150 B of RAM, the limit is 100 B")
    answer = decide(60, Resident("a", 60, wanting=True), Resident("b", 10), evict=False)
    assert answer == Refuse("needs 60 B of RAM, the limit is 100 B, of which 60 B its own other replicas")


residents = st.lists(
    st.builds(
        Resident,
        st.just(""),
        st.integers(0, 60),
        st.dictionaries(st.sampled_from(["g0", "g1"]), st.integers(0, 40)),
        busy=st.booleans(),
        pinned=st.booleans(),
        leaving=st.booleans(),
        superseded=st.booleans(),
        since=st.sampled_from([NOW - 100, NOW - 5]),
        last_used=st.floats(0, NOW),
    ),
    max_size=6,
).map(lambda found: [replace(one, key=f"r{index}") for index, one in enumerate(found)])
needs = st.builds(Need, st.integers(0, 120), gpu_bytes=st.integers(0, 90), gpu_count=st.integers(0, 2))


@given(needs, residents, st.booleans())
def test_any_decision_is_sound(wanted: Need, loaded: list[Resident], evict: bool) -> None:
    limits = Limits(100, {"g0": 50, "g1": 40}, {"g0": 50, "g1": 40})
    answer = plan_admission(wanted, loaded, limits, NOW, min_residence_s=10, evict=evict)
    by_key = {one.key: one for one in loaded}
    match answer:
        case Fits(gpus):
            assert sum(one.ram_bytes for one in loaded) + wanted.ram_bytes <= 100
            assert sum(gpus.values()) >= wanted.gpu_bytes
            for uuid, size in gpus.items():
                assert size + sum(one.gpus.get(uuid, 0) for one in loaded) <= limits.gpus[uuid]
        case Evict(keys):
            assert evict
            for key in keys:
                one = by_key[key]
                assert one.superseded or not (one.busy or one.pinned or one.since + 10 > NOW)
                assert not one.leaving
            rest = [one for one in loaded if one.key not in keys and not one.leaving]
            assert place(wanted, rest, limits) is not None
            for key in keys:
                assert place(wanted, [*rest, by_key[key]], limits) is None, "it need not have left"
        case Wait(until):
            fixed = [one for one in loaded if one.pinned and not one.superseded and not one.leaving]
            assert place(wanted, fixed, limits) is not None, "waiting can help"
            assert until is None or until > NOW
        case Refuse(message):
            fixed = [one for one in loaded if one.pinned and not one.superseded and not one.leaving]
            assert not evict or place(wanted, fixed, limits) is None
            assert "needs" in message


GPUS = Limits(100, {"g0": 50, "g1": 40}, {"g0": 60, "g1": 60})


def test_a_gpu_of_its_own_comes_first() -> None:
    need = Need(1, gpu_bytes=30)
    assert place(need, [], GPUS) == {"g0": 30}
    assert place(need, [Resident("a", 1, {"g0": 10})], GPUS) == {"g1": 30}


def test_what_is_too_large_for_one_gpu_takes_several() -> None:
    assert place(Need(1, gpu_bytes=80), [], GPUS) == {"g0": 40, "g1": 40}
    assert place(Need(1, gpu_bytes=81), [], GPUS) is None


def test_a_fraction_is_of_the_whole_device_and_named_gpus_are_kept_to() -> None:
    need = Need(1, gpu_fraction=0.5, gpu_count=1, gpus=("g1",))
    assert place(need, [], GPUS) == {"g1": 30}
    assert place(need, [Resident("a", 1, {"g1": 20})], GPUS) is None


def test_without_gpus_the_refusal_says_so() -> None:
    answer = plan_admission(Need(1, gpu_bytes=30, gpu_count=2), [], LIMITS, NOW, min_residence_s=0)
    assert answer == Refuse("needs 2 GPUs, 30 B of GPU memory, the limits are none")


def test_what_others_have_on_a_gpu_is_not_there_for_us_and_a_divided_one_is_not_whole() -> None:
    devices = [
        Device("g0", 100, used_bytes=35),
        Device("g1", 100, used_bytes=50),
        Device("mig", 50, parent="g1"),
    ]
    limits = gpu_limits(devices, 90, {"g0": 5})
    assert limits.gpus == {"g0": 70, "mig": 45}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.max": "1000000"}, 500_000),
        ({"memory/memory.limit_in_bytes": "2000000"}, 1_000_000),
    ],
)
def test_the_control_group_bounds_the_memory(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert ram_limit(0, 50, tmp_path) == expected
    assert ram_limit(7, 50, tmp_path) == 7


def test_without_a_limit_it_is_what_the_machine_has(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    assert ram_limit(0, 100, tmp_path) == psutil.virtual_memory().total
