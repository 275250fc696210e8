"""Whether a replica may be loaded now: decided without I/O, from what is loaded and what there is."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from helixflow.pool.disk import format_bytes
from helixflow.pool.memory import Limits, Need


@dataclass(frozen=True, slots=True)
class Resident:
    """A deployment that takes memory. Only what is neither busy (loading counts) nor pinned can be made to leave.

    `leaving`: it was asked to, and its memory is free soon. `superseded`: another one takes its place, so it goes first
    and whatever it does. `wanting`: it is the one that wants more, and does not leave for itself. `since` and
    `last_used` are on the monotonic clock.
    """

    key: str
    ram_bytes: int
    gpus: Mapping[str, int] = field(default_factory=dict)
    busy: bool = False
    pinned: bool = False
    leaving: bool = False
    superseded: bool = False
    wanting: bool = False
    since: float = 0.0
    last_used: float = 0.0


@dataclass(frozen=True, slots=True)
class Fits:
    """It may be loaded; `gpus` is what it gets of each GPU."""

    gpus: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Evict:
    """It fits once these have left."""

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """It can fit later: at `until` (None: not known) or when something of what is loaded changes. `reason` in words."""

    until: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """It cannot fit, whatever leaves by itself or may be evicted. One line with the numbers."""

    message: str


Admission = Fits | Evict | Wait | Refuse


def plan_admission(
    wanted: Need, loaded: Sequence[Resident], limits: Limits, now: float, *, min_residence_s: float, evict: bool = True
) -> Admission:
    """What is to be done so that `wanted` can be loaded; see the results.

    The least recently used go first, and none that need not. With `evict` false only room that is there counts: it is
    refused instead of anything being evicted or waited for.
    """
    if (gpus := place(wanted, loaded, limits)) is not None:
        return Fits(gpus)
    own = [one for one in loaded if one.wanting]
    if not evict and place(wanted, own, limits) is None:
        # Nothing of another model is in the way.
        return Refuse(_explain(wanted, own, limits))
    if not evict:
        return Refuse(f"no room without unloading another model: {_explain(wanted, loaded, limits)}")
    staying = [one for one in loaded if not one.leaving]
    if place(wanted, staying, limits) is not None:
        return Wait(None, "waits for the memory of a model that is being unloaded")
    candidates = sorted(
        (one for one in staying if one.superseded or not (one.busy or one.pinned or one.wanting)),
        key=lambda one: (not one.superseded, one.last_used, one.key),
    )
    ripe = [one for one in candidates if one.superseded or one.since + min_residence_s <= now]
    if (leaving := _fewest(wanted, staying, ripe, limits)) is not None:
        return Evict(leaving)
    for one in sorted(candidates, key=lambda one: one.since):
        if one not in ripe:
            ripe.append(one)
            if _fewest(wanted, staying, ripe, limits) is not None:
                return Wait(one.since + min_residence_s, f"waits until {one.key} has been loaded for its shortest time")
    fixed = [one for one in staying if (one.pinned or one.wanting) and not one.superseded]
    if place(wanted, fixed, limits) is not None:
        return Wait(None, f"waits for memory: {_explain(wanted, loaded, limits)}")
    return Refuse(_explain(wanted, fixed, limits))


def place(wanted: Need, loaded: Collection[Resident], limits: Limits) -> Mapping[str, int] | None:
    """What `wanted` gets of each GPU beside what is loaded, empty when it needs none; None when it does not fit."""
    if sum(one.ram_bytes for one in loaded) + wanted.ram_bytes > limits.ram_bytes:
        return None
    if not wanted.wants_gpu:
        return {}
    free = {
        uuid: limit - sum(one.gpus.get(uuid, 0) for one in loaded)
        for uuid, limit in limits.gpus.items()
        if not wanted.gpus or uuid in wanted.gpus
    }
    # A GPU to itself before one that is shared, then the one with most room.
    order = sorted(free, key=lambda uuid: (free[uuid] < limits.gpus[uuid], -free[uuid], uuid))
    counts = (wanted.gpu_count,) if wanted.gpu_count else range(1, len(order) + 1)
    for count in counts:
        shares = {uuid: _share(wanted, uuid, count, limits) for uuid in order}
        chosen = [uuid for uuid in order if shares[uuid] <= free[uuid]][:count]
        if len(chosen) == count:
            return {uuid: shares[uuid] for uuid in chosen}
    return None


def _share(wanted: Need, uuid: str, count: int, limits: Limits) -> int:
    return int(wanted.gpu_fraction * limits.gpu_sizes.get(uuid, 0)) + -(-wanted.gpu_bytes // count)


def _fewest(
    wanted: Need, staying: Sequence[Resident], candidates: Sequence[Resident], limits: Limits
) -> tuple[str, ...] | None:
    """The keys of candidates, from the first on, without which it fits; None when not even without all."""
    chosen: list[Resident] = []
    for one in candidates:
        chosen.append(one)
        if _fits_without(wanted, staying, chosen, limits):
            break
    else:
        return None
    # One that was taken early may have become needless by a larger one that came later.
    for one in tuple(chosen[:-1]):
        rest = [other for other in chosen if other is not one]
        if _fits_without(wanted, staying, rest, limits):
            chosen = rest
    return tuple(one.key for one in chosen)


def _fits_without(wanted: Need, staying: Sequence[Resident], gone: Sequence[Resident], limits: Limits) -> bool:
    return place(wanted, [one for one in staying if one not in gone], limits) is not None


def _explain(wanted: Need, loaded: Sequence[Resident], limits: Limits) -> str:
    """`needs 1.2 GB of RAM, the limit is 1.0 GB, of which 0.2 GB pinned`."""
    held = sum(one.ram_bytes for one in loaded)
    clauses = []
    if held + wanted.ram_bytes > limits.ram_bytes or not wanted.wants_gpu:
        clauses.append(
            f"needs {format_bytes(wanted.ram_bytes)} of RAM{_parts(wanted)}, "
            f"the limit is {format_bytes(limits.ram_bytes)}{_held([(one, one.ram_bytes) for one in loaded])}"
        )
    if wanted.wants_gpu:
        which = [uuid for uuid in limits.gpus if not wanted.gpus or uuid in wanted.gpus]
        needs = format_bytes(wanted.gpu_bytes) if wanted.gpu_bytes else f"{wanted.gpu_fraction:.0%} of each"
        have = ", ".join(format_bytes(limits.gpus[uuid]) for uuid in which) or "none"
        on_gpus = [(one, sum(one.gpus.values())) for one in loaded]
        count = f"{wanted.gpu_count} GPUs, " if wanted.gpu_count > 1 else ""
        clauses.append(f"needs {count}{needs} of GPU memory, the limits are {have}{_held(on_gpus)}")
    return "; ".join(clauses)


def _parts(wanted: Need) -> str:
    named = [f"{name} {format_bytes(size)}" for name, size in wanted.parts.items() if size]
    return f" ({', '.join(named)})" if named else ""


def _held(amounts: Sequence[tuple[Resident, int]]) -> str:
    own = sum(size for one, size in amounts if one.wanting)
    pinned = sum(size for one, size in amounts if one.pinned and not one.wanting)
    busy = sum(size for one, size in amounts if one.busy and not (one.pinned or one.wanting))
    idle = sum(size for _, size in amounts) - own - pinned - busy
    named = ((own, "its own other replicas"), (pinned, "pinned"), (busy, "busy"), (idle, "idle"))
    held = [f"{format_bytes(size)} {what}" for size, what in named if size]
    return f", of which {' and '.join(held)}" if held else ""
