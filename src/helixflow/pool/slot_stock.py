"""How many slots of each replica nobody has: what is lent is never more than there is, whoever crashes. No I/O."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from helixflow.core.clock import Clock

# A gateway whose stream broke is back by then, or its process is gone and its sockets are closed.
RECONNECT_S: Final = 1.5
# Gateways report what they use within 250 ms.
REPORTED_S: Final = 0.35
# Who nobody knows: gateways of before.
_SOMEBODY: Final = ""


@dataclass(slots=True)
class _Missing:
    """Slots that a gateway had whose stream is broken. They are looked for from `due` on."""

    slots: int
    due: float


@dataclass(slots=True)
class _Probe:
    """An engine had `active` generations; `low` is the fewest that connected gateways have had, each, since then."""

    active: int
    until: float
    low: dict[str, int]


@dataclass(slots=True)
class _Replica:
    slots: int
    is_open: bool = True
    lent: int = 0
    missing: dict[str, _Missing] = field(default_factory=dict)
    probe: _Probe | None = None

    @property
    def free(self) -> int:
        return self.slots - self.lent - sum(one.slots for one in self.missing.values())


class SlotStock:
    """The slots of a deployment's replicas: lent, free, or missing.

    Missing are those of a gateway whose stream has broken, and all of a replica that ran before this process did, until
    the gateway is back and says what it holds, or the replica's engine has no more generations than others account for:
    `overdue` says of which replicas that is to be asked, `found` takes the answer.
    """

    def __init__(self, clock: Clock) -> None:
        self._now = clock.monotonic
        self._replicas: dict[str, _Replica] = {}

    @property
    def replicas(self) -> Iterable[str]:
        return self._replicas.keys()

    @property
    def missing(self) -> int:
        return sum(one.slots for replica in self._replicas.values() for one in replica.missing.values())

    def free(self) -> dict[str, int]:
        """Slots that may be lent, by replica; none that has none."""
        return {name: one.free for name, one in self._replicas.items() if one.is_open and one.free > 0}

    def update(
        self, replicas: Mapping[str, int], *, closing: Collection[str] = (), inherited: Collection[str] = ()
    ) -> tuple[list[str], list[str]]:
        """Takes over the replicas that there are now, with their slots. Returns those that are gone, and those that are
        closing since now.
        """
        closed = []
        gone = [name for name in self._replicas if name not in replicas]
        for name in gone:
            del self._replicas[name]
        for name, slots in replicas.items():
            replica = self._replicas.get(name)
            if replica is None:
                replica = self._replicas[name] = _Replica(slots)
                if name in inherited:
                    replica.missing[_SOMEBODY] = _Missing(slots, self._now() + RECONNECT_S)
            replica.slots = slots
            if replica.is_open and name in closing:
                closed.append(name)
            replica.is_open = name not in closing
        return gone, closed

    def take(self, name: str, slots: int) -> None:
        """They are lent. Only what is free may be."""
        replica = self._replicas[name]
        assert slots <= replica.free
        replica.lent += slots

    def put_back(self, name: str, slots: int) -> None:
        self._replicas[name].lent -= slots

    def claim(self, name: str, slots: int) -> bool:
        """A gateway that has connected has them, whatever was known. False for a replica that is gone."""
        replica = self._replicas.get(name)
        if replica is None:
            return False
        replica.lent += slots
        unknown = replica.missing.get(_SOMEBODY)
        if unknown is not None:
            unknown.slots -= slots
            if unknown.slots <= 0:
                del replica.missing[_SOMEBODY]
        return True

    def lose(self, gateway: str, held: Mapping[str, int]) -> None:
        """The stream of a gateway is broken that had these."""
        for name, slots in held.items():
            replica = self._replicas.get(name)
            if replica is None or not slots:
                continue
            replica.lent -= slots
            before = replica.missing.pop(gateway, None)
            replica.missing[gateway] = _Missing(
                slots + (before.slots if before is not None else 0), self._now() + RECONNECT_S
            )

    def settle_with(self, gateway: str) -> None:
        """It is back and says itself what it has."""
        for replica in self._replicas.values():
            replica.missing.pop(gateway, None)

    def overdue(self) -> list[str]:
        """Replicas whose engines are to be asked what runs in them."""
        now = self._now()
        return [
            name
            for name, replica in self._replicas.items()
            if replica.probe is None and any(one.due <= now for one in replica.missing.values())
        ]

    def found(self, name: str, active: int, busy: Mapping[str, int]) -> None:
        """The engine of a replica has `active` generations; connected gateways had last reported so many of them.

        What they account for is known only once they have reported again: until then the answer rests, see `conclude`.
        """
        replica = self._replicas.get(name)
        if replica is None:
            return
        replica.probe = _Probe(active, self._now() + (REPORTED_S if active and replica.lent else 0.0), dict(busy))

    def saw_busy(self, name: str, gateway: str, busy: int) -> None:
        """A gateway has reported the fewest generations that it had since its last report."""
        replica = self._replicas.get(name)
        if replica is not None and replica.probe is not None:
            low = replica.probe.low
            low[gateway] = min(low.get(gateway, 0), busy)

    def conclude(self) -> bool:
        """Frees what engines have shown to be free. Whether anything was."""
        now = self._now()
        freed = False
        for replica in self._replicas.values():
            probe = replica.probe
            if probe is None or probe.until > now:
                continue
            replica.probe = None
            unexplained = max(0, probe.active - sum(probe.low.values()))
            overdue = sorted(
                (name for name, one in replica.missing.items() if one.due <= now),
                key=lambda name: replica.missing[name].due,
            )
            for name in overdue:
                one = replica.missing[name]
                kept = min(one.slots, unexplained)
                unexplained -= kept
                freed = freed or kept < one.slots
                one.slots, one.due = kept, now + REPORTED_S
                if not kept:
                    del replica.missing[name]
        return freed
