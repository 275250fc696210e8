"""A request that waits for a slot, as the gateway has it."""

import asyncio
from collections.abc import Collection
from typing import Final

from helixflow.core.call import Call
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.principal import Principal
from helixflow.routing.fair_queue import Tenant, Waiting
from helixflow.routing.seats import SlotLease

# For estimates, which are corrected once it is known: bytes of a request a token, and tokens of an answer at most.
_BYTES_A_TOKEN: Final = 4
_ANSWER_TOKENS: Final = 256


class Waiter:
    """`future` gets the lease; None says that the replicas are gone and the wait for one begins anew.

    It waits at one desk: with a `ticket` in the pool's queue, or as `waiting` in the desk's own.
    """

    __slots__ = ("avoid", "call", "estimate", "future", "prefer", "since", "tenant", "ticket", "waiting")

    def __init__(self, call: Call, avoid: Collection[str], prefer: str, since: float) -> None:
        self.call = call
        self.tenant = tenant_of(call.principal)
        self.estimate = estimate(call)
        self.avoid = frozenset(avoid)
        self.prefer = prefer
        self.since = since
        self.ticket = 0
        self.waiting: Waiting[Waiter] | None = None
        self.future: asyncio.Future[SlotLease | None] = asyncio.get_running_loop().create_future()

    def refuse(self, retry_after_s: float, *, queue_full: bool) -> None:
        self.fail(refusal(retry_after_s, queue_full=queue_full))

    def fail(self, error: HelixError) -> None:
        if not self.future.done():
            self.future.set_exception(error)


def refusal(retry_after_s: float, *, queue_full: bool) -> HelixError:
    why = "its queue is full" if queue_full else "the request would wait longer than its deadline allows"
    return HelixError(
        ErrorKind.OVERLOADED, f"The model is busy and {why}; try again later.", retry_after_s=retry_after_s
    )


def tenant_of(principal: Principal) -> Tenant:
    return Tenant(principal.organisation_id, principal.id, principal.organisation_weight, principal.weight)


def estimate(call: Call) -> int:
    """Tokens that it will probably use."""
    limit = getattr(call.params, "answer_limit", 0)
    return call.body_bytes // _BYTES_A_TOKEN + (_ANSWER_TOKENS if limit is None else min(limit, _ANSWER_TOKENS))
