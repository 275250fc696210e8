"""Decisions of supervision, without I/O: what a deployment's state is, whether to restart, what a crash was."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from helixflow.core.capacity import Replica
from helixflow.pool.memory import Need
from helixflow.process.backoff import Backoff

GIVE_UP_AFTER: Final = 5
_ERROR_MARK: Final = re.compile(r"^\S* E (?:[a-z]{2,4}\s+)?")
_MAX_CAUSE_CHARS: Final = 300
# Python's, as vLLM writes them: `ValueError: …`, alone or behind the head of a log line.
_RAISED: Final = re.compile(r"(?:^|\] )((?:\w+\.)*\w*(?:Error|Exception): .+)")
# Of pydantic's the next line says what is wrong.
_VALIDATION: Final = re.compile(r"\d+ validation errors? for \w+$")
_KILLED: Final = -9


class State(Enum):
    """As `DeploymentState` of pool.proto; the value is its number. Also the state of each seat of a deployment."""

    IDLE = 1
    PULLING = 2
    LOADING = 3
    READY = 4
    BACKOFF = 5
    FAILED = 6
    UNLOADING = 7


@dataclass(frozen=True, slots=True)
class ServingReplica:
    """A replica that serves, the process behind it, and the GPUs that it has, by UUID. `trouble`: what of its settings
    it serves without.
    """

    replica: Replica
    pid: int
    gpus: tuple[str, ...] = ()
    tokenizer_sha256: str = ""
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class SeatView:
    """One place for a replica: what it is doing now. `retry_at` is on the monotonic clock, for BACKOFF.

    `lacks_memory`: it could not be loaded for that, `detail` has the numbers.
    """

    state: State = State.IDLE
    detail: str = ""
    retry_at: float = 0.0
    serving: ServingReplica | None = None
    lacks_memory: bool = False


@dataclass(frozen=True, slots=True)
class DeploymentView:
    """What watchers see of a deployment.

    `replicas` serve; those `closing` go on with the generations that they have and get no others.
    `need` is what one replica takes, None while it is not known; `last_used_at` in seconds since the epoch, 0 for
    never; `busy` its slots with a running generation, over all gateways, by replica.
    """

    deployment: str
    state: State
    detail: str
    restarts: int
    retry_after_s: float
    replicas: tuple[ServingReplica, ...]
    closing: tuple[ServingReplica, ...] = ()
    pinned: bool = False
    wanted_replicas: int = 1
    need: Need | None = None
    last_used_at: float = 0.0
    busy: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Restart:
    """Try again after `delay_s`."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Restarting does not help; somebody must ask for it."""


class CrashHistory:
    """Counts the failures of a seat and decides: back off, or give up after `GIVE_UP_AFTER` failed starts in a row."""

    def __init__(self, backoff: Backoff) -> None:
        self._backoff = backoff
        self._failed_starts = 0

    def decide(self, ready_s: float | None) -> Restart | GiveUp:
        """After an end: `ready_s` is how long the engine served, None when it never became ready."""
        self._failed_starts = self._failed_starts + 1 if ready_s is None else 0
        if self._failed_starts >= GIVE_UP_AFTER:
            return GiveUp()
        return Restart(self._backoff.next_delay_s(ready_s or 0.0))

    def forgive(self) -> None:
        """Starts anew, because somebody asked for it."""
        self._failed_starts = 0
        self._backoff.reset()


# The best that any seat offers is what the deployment offers.
_ORDER: Final = (
    State.READY,
    State.UNLOADING,
    State.LOADING,
    State.PULLING,
    State.BACKOFF,
    State.FAILED,
    State.IDLE,
)


def combine(
    name: str, seats: Sequence[SeatView], *, restarts: int, now: float, out_of_service: str = ""
) -> DeploymentView:
    """The deployment's view from those of its seats. `detail` and `retry_after_s` come from the seat that decides.

    `out_of_service`: why an idle one is not loaded when it is asked for; it is then shown as failed.
    """
    leading = min(seats, key=lambda seat: (_ORDER.index(seat.state), seat.retry_at))
    waits = leading.state is State.BACKOFF
    troubled = next((seat for seat in seats if seat.state in (State.BACKOFF, State.FAILED)), None)
    without_room = next((seat for seat in seats if seat.state is State.IDLE and seat.lacks_memory), None)
    state = leading.state
    detail = next((seat.detail for seat in seats if seat.state is state and seat.detail), "")
    if state is not State.READY:
        detail = leading.detail
    if state is State.IDLE and out_of_service:
        state, detail = State.FAILED, out_of_service
    if state is State.READY and troubled is not None:
        detail = f"a replica is down: {troubled.detail}"
    elif state is State.READY and without_room is not None:
        detail = f"a replica is not loaded: {without_room.detail}"
    return DeploymentView(
        deployment=name,
        state=state,
        detail=detail,
        restarts=restarts,
        retry_after_s=round(max(0.0, leading.retry_at - now), 3) if waits else 0.0,
        replicas=tuple(seat.serving for seat in seats if seat.serving is not None and seat.state is State.READY),
        closing=tuple(seat.serving for seat in seats if seat.serving is not None and seat.state is State.UNLOADING),
    )


def cause_of_exit(status: int, tail: Sequence[str], *, was_ready: bool) -> str:
    """One line on why an engine ended: `status` negative for a signal, `tail` its last lines of output.

    Before it served, llama.cpp's first error is the cause and the rest follows from it; later its last. So it is with
    exceptions of engines in Python.
    """
    errors = [line for line in tail if _ERROR_MARK.match(line)]
    if errors:
        line = _ERROR_MARK.sub("", errors[-1 if was_ready else 0])
    elif status == _KILLED:
        line = "killed (SIGKILL): out of memory, or somebody ended it"
    elif raised := _raised(tail):
        line = raised[-1 if was_ready else 0]
    elif tail and not was_ready:
        line = tail[-1]
    else:
        line = f"ended by signal {-status}" if status < 0 else f"ended with status {status}"
    return " ".join(line.split())[:_MAX_CAUSE_CHARS]


def _raised(tail: Sequence[str]) -> list[str]:
    """The exceptions in an output, in order."""
    found = []
    for position, line in enumerate(tail):
        if match := _RAISED.search(line):
            says_next = _VALIDATION.search(match[1]) is not None and position + 1 < len(tail)
            found.append(tail[position + 1] if says_next else match[1])
    return found
