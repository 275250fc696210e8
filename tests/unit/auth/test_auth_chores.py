import pytest
import structlog

from helixflow.auth.chores import Chore, Chores
from helixflow.core.clock import FakeClock
from helixflow.core.errors import ErrorKind, HelixError


async def test_each_chore_is_done_at_its_own_pace() -> None:
    clock = FakeClock()
    done: list[tuple[str, int]] = []

    def chore(name: str, every_s: float) -> Chore:
        async def do(now: int) -> None:
            done.append((name, now - int(clock._start)))

        return Chore(name, every_s, do)

    chores = Chores([chore("often", 10), chore("seldom", 25)], clock)
    for _ in range(5):
        await chores.do_due()
        await chores.do_due()
        clock.advance(10)
    assert [at for name, at in done if name == "often"] == [0, 10, 20, 30, 40]
    assert [at for name, at in done if name == "seldom"] == [0, 30]


async def test_one_that_fails_hinders_no_other_and_is_told_once_for_each_outage() -> None:
    clock = FakeClock()
    away, done = True, 0

    async def fail(_now: int) -> None:
        if away:
            raise HelixError(ErrorKind.UNAVAILABLE, "The database cannot be used now.")

    async def work(_now: int) -> None:
        nonlocal done
        done += 1

    chores = Chores([Chore("failing", 1, fail), Chore("working", 1, work)], clock)
    with structlog.testing.capture_logs() as logs:
        for turn in range(8):
            away = turn not in (3, 4)
            await chores.do_due()
            clock.advance(1)
    assert done == 8
    assert [(line["event"], line["chore"]) for line in logs] == [("chore.failed", "failing")] * 2


async def test_a_fault_of_ours_is_not_hidden() -> None:
    async def crash(_now: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await Chores([Chore("crashing", 1, crash)], FakeClock()).do_due()
