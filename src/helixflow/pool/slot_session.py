"""A gateway that leases slots of a deployment, as the broker knows it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from helixflow.routing.fair_queue import Tenant, Waiting
from helixflow.rpc.generated.pool_v1.pool_pb2 import LeaseSlotsResponse

# Of the tenants that a gateway has told of last, so many are told back to it.
_MOST_TOLD: Final = 128


class Session:
    """A gateway that leases, over one stream. `busy` are its slots with a running generation: as it last reported, and
    those that were granted for a request since.
    """

    def __init__(self, gateway: str, send: Callable[[LeaseSlotsResponse], None]) -> None:
        self.gateway = gateway
        self.send = send
        self.held: dict[str, int] = {}
        self.busy: dict[str, int] = {}
        # What it has been asked to give back and has not yet.
        self.recalled: dict[str, int] = {}
        # What it has surely used at the time of its last report.
        self.low: dict[str, int] = {}
        self.asks: dict[int, Waiting[Ask]] = {}
        self.tenants: dict[tuple[str, str], Tenant] = {}
        # Estimates that were counted with its grants, of requests that run.
        self.reserved: dict[Tenant, int] = {}
        self.told: LeaseSlotsResponse.Status | None = None

    @property
    def idle(self) -> int:
        """Slots that were lent to it, have no generation and were not recalled."""
        return sum(self.held.values()) - sum(self.busy.values()) - sum(self.recalled.values())

    def reserve(self, tenant: Tenant, tokens: int) -> None:
        reserved = self.reserved.get(tenant, 0) + tokens
        if reserved > 0:
            self.reserved[tenant] = reserved
        else:
            self.reserved.pop(tenant, None)

    def tell_of(self, tenant: Tenant) -> None:
        name = (tenant.organisation, tenant.key)
        self.tenants.pop(name, None)
        self.tenants[name] = tenant
        if len(self.tenants) > _MOST_TOLD:
            del self.tenants[next(iter(self.tenants))]


@dataclass(slots=True, eq=False)
class Ask:
    """A request that waits."""

    session: Session
    ticket: int
    prefer: tuple[str, ...]
    avoid: frozenset[str]
