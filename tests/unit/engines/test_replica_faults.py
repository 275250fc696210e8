"""A call begins again elsewhere while its replicas fail, but not for ever, and not for its own mistakes."""

import pytest

from helixflow.core.capacity import Replica
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.engines.replica_faults import MOST_STARTS, start_on_some
from tests.harness.breaking import ListedSlots


def slots_with(replicas: int) -> ListedSlots:
    return ListedSlots([Replica(f"r{number}", "127.0.0.1", 1, "key", 1, 64) for number in range(replicas)])


class Starts:
    """Fails with `errors`, one after the other, and then starts."""

    def __init__(self, *errors: ErrorKind) -> None:
        self._errors = list(errors)
        self.count = 0

    async def __call__(self) -> str:
        self.count += 1
        if self._errors:
            raise HelixError(self._errors.pop(0), f"failure {self.count}")
        return "started"


@pytest.mark.parametrize("losses", range(MOST_STARTS))
async def test_replicas_may_fail_a_few_times(losses: int) -> None:
    starts = Starts(*[ErrorKind.UPSTREAM_UNAVAILABLE] * losses)
    assert await start_on_some(starts, slots_with(2)) == "started"


async def test_a_request_that_kills_whatever_serves_it_is_given_up() -> None:
    starts = Starts(*[ErrorKind.UPSTREAM_UNAVAILABLE] * 20)
    with pytest.raises(HelixError, match=f"failure {MOST_STARTS}"):
        await start_on_some(starts, slots_with(2))


@pytest.mark.parametrize(
    ("replicas", "kind"),
    [(0, ErrorKind.UPSTREAM_UNAVAILABLE), (2, ErrorKind.INVALID_REQUEST), (2, ErrorKind.OVERLOADED)],
)
async def test_nothing_is_tried_where_it_cannot_help(replicas: int, kind: ErrorKind) -> None:
    starts = Starts(kind)
    with pytest.raises(HelixError):
        await start_on_some(starts, slots_with(replicas))
    assert starts.count == 1
