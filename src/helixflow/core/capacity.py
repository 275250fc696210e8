"""Who may use an engine now: leases on the slots of replicas."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from helixflow.core.call import Call


@dataclass(frozen=True, slots=True)
class Replica:
    """One running engine process: where it listens and the random key it wants. `slots` generations fit at once.

    `context` is the most tokens (prompt + answer) one request may use; `supports_tools` says whether the model's own
    chat template knows tools; `vocabulary` is its number of token ids, 0 when unknown. `model_digest` is equal for
    replicas that make the same tokens of the same prompt; empty when that is not known. `tokenizer_path` is that of the
    model's tokenizer.json on the gateway's own node, empty without one. `adapters` are the further models that it
    serves, by the names it has for them.

    On another node (`server_name` not empty) `host` and `port` are the data port of the pool there: TLS with the
    gateway's identity, where the server name says which replica is meant.
    """

    replica_id: str
    host: str
    port: int
    api_key: str = field(repr=False)
    slots: int
    context: int
    supports_tools: bool = False
    vocabulary: int = 0
    tokenizer_path: str = ""
    model_digest: str = ""
    server_name: str = ""
    pool: str = ""
    adapters: tuple[str, ...] = ()


class ProviderLimits:
    """What a provider last said of its own limits: filled in by the engine that read it, heeded by routing.

    `are_known` once it has said anything. Of requests and of tokens: how many were left (infinite: it never said), how
    many come back in a second, and the moment on `time.monotonic`'s clock at which that was so.
    """

    __slots__ = (
        "are_known",
        "requests_a_second",
        "requests_at",
        "requests_left",
        "tokens_a_second",
        "tokens_at",
        "tokens_left",
    )

    def __init__(self) -> None:
        self.are_known = False
        self.requests_left = self.tokens_left = math.inf
        self.requests_a_second = self.tokens_a_second = 0.0
        self.requests_at = self.tokens_at = 0.0


@runtime_checkable
class Limited(Protocol):
    """An engine whose server says what its limits are."""

    @property
    def limits(self) -> ProviderLimits: ...


class Lease(Protocol):
    """The right to run one generation on one replica. Release exactly once."""

    @property
    def replica(self) -> Replica: ...

    def charge(self, tokens: int) -> None:
        """Counts tokens against the tenant's share, as they happen: the prompt once it is read, each token made."""
        ...

    def release(self, *, failed: bool = False) -> None:
        """Gives the slot back; `failed` counts against the replica's health. Idempotent; never raises."""
        ...


class Slots(Protocol):
    """The slots of all replicas of one deployment, with the queue before them."""

    async def any_replica(self, deadline: float) -> Replica:
        """A replica that serves, without a lease on it: for what is the same on all of them. Raises as `acquire`."""
        ...

    def replicas(self) -> Collection[Replica]:
        """Those that serve, as they are now."""
        ...

    def has_alternative(self) -> bool:
        """Whether a replica serves on which nothing has failed just now."""
        ...

    async def acquire(self, call: Call, *, avoid: Collection[str] = ()) -> Lease:
        """Waits for a free slot until the call's deadline, in the order that is fair to its tenant.

        Replicas whose ids are in `avoid` are not used. Raises `HelixError`: `LOADING` when no replica became ready in
        time, `OVERLOADED` when the queue is full or the wait would be too long, `UPSTREAM_UNAVAILABLE` when the
        deployment's replicas keep failing.
        """
        ...
