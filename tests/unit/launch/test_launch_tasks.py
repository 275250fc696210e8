import asyncio

import pytest

from helixflow.core.errors import ErrorKind, ExitCode, HelixError, UserError
from helixflow.launch.tasks import until_stopped


async def _for_ever() -> None:
    await asyncio.Event().wait()


async def _raise(error: BaseException) -> None:
    raise error


async def _return() -> None:
    pass


@pytest.fixture
async def lasting() -> "asyncio.Task[None]":
    return asyncio.create_task(_for_ever(), name="lasting")


async def test_it_returns_when_asked_to_stop_and_leaves_the_tasks_alone(lasting: "asyncio.Task[None]") -> None:
    stopping = asyncio.Event()
    waiting = asyncio.create_task(until_stopped(stopping, [lasting]))
    await asyncio.sleep(0)
    assert not waiting.done()
    stopping.set()
    await waiting
    assert not lasting.done()
    lasting.cancel()


async def test_a_task_that_fails_is_named_with_its_cause(lasting: "asyncio.Task[None]") -> None:
    cause = OSError(28, "No space left on device")
    dying = asyncio.create_task(_raise(cause), name="certificate")
    with pytest.raises(HelixError, match="'certificate'") as caught:
        await until_stopped(asyncio.Event(), [lasting, dying])
    assert caught.value.kind is ErrorKind.INTERNAL
    assert caught.value.__cause__ is cause
    lasting.cancel()


@pytest.mark.parametrize("cancelled", [True, False])
async def test_a_task_that_merely_ends_is_a_fault_too(lasting: "asyncio.Task[None]", cancelled: bool) -> None:
    ending = asyncio.create_task(_for_ever() if cancelled else _return(), name="ending")
    if cancelled:
        ending.cancel()
    with pytest.raises(HelixError, match="'ending'"):
        await until_stopped(asyncio.Event(), [lasting, ending])
    lasting.cancel()


@pytest.mark.parametrize(
    "error", [UserError("no room", ExitCode.STORAGE), HelixError(ErrorKind.UNAVAILABLE, "The launcher is gone.")]
)
async def test_our_own_errors_come_as_they_are(error: Exception) -> None:
    returning, failing = asyncio.create_task(_return()), asyncio.create_task(_raise(error))
    await asyncio.wait([returning, failing])
    with pytest.raises(type(error)) as caught:
        await until_stopped(asyncio.Event(), [returning, failing])
    assert caught.value is error


async def test_our_own_errors_come_out_of_the_groups_of_tasks_within_tasks() -> None:
    error = HelixError(ErrorKind.UNAVAILABLE, "The launcher is gone.")
    inner = ExceptionGroup("pool", [OSError(28, "No space left on device"), error])
    failing = asyncio.create_task(_raise(ExceptionGroup("node", [inner])))
    with pytest.raises(HelixError) as caught:
        await until_stopped(asyncio.Event(), [failing])
    assert caught.value is error


async def test_a_stop_that_comes_with_a_failure_is_a_stop() -> None:
    stopping = asyncio.Event()
    stopping.set()
    failing = asyncio.create_task(_raise(OSError()))
    await asyncio.wait([failing])
    await until_stopped(stopping, [failing])
    assert isinstance(failing.exception(), OSError)
