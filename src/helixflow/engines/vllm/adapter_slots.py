"""Slots for requests that name a LoRA adapter: a replica that has not loaded it does not get them."""

from collections.abc import Collection

from helixflow.core.call import Call
from helixflow.core.capacity import Lease, Replica, Slots
from helixflow.core.errors import ErrorKind, HelixError


class AdapterSlots:
    """Implements `Slots` over others. `adapters` are the names that ask for one; requests for another pass through."""

    def __init__(self, slots: Slots, adapters: Collection[str]) -> None:
        self._slots = slots
        self._adapters = frozenset(adapters)

    async def any_replica(self, deadline: float) -> Replica:
        return await self._slots.any_replica(deadline)

    def replicas(self) -> Collection[Replica]:
        return self._slots.replicas()

    def has_alternative(self) -> bool:
        return self._slots.has_alternative()

    async def acquire(self, call: Call, *, avoid: Collection[str] = ()) -> Lease:
        """Raises also `HelixError` (UNAVAILABLE) when replicas serve and none that may be used has the adapter."""
        adapter = call.alias
        if adapter not in self._adapters:
            return await self._slots.acquire(call, avoid=avoid)
        while True:
            serving = self._slots.replicas()
            lacking = {replica.replica_id for replica in serving if adapter not in replica.adapters}
            barred = lacking.union(avoid)
            if serving and all(replica.replica_id in barred for replica in serving):
                raise HelixError(
                    ErrorKind.UNAVAILABLE, f"The adapter '{adapter}' is not loaded on any replica.", retry_after_s=1
                )
            lease = await self._slots.acquire(call, avoid=barred)
            # It may have become ready, or have lost the adapter, while the request waited.
            if adapter in lease.replica.adapters:
                return lease
            lease.release()
