"""Which seat probably still has the beginning of a prompt in its cache: a bounded memory of where beginnings went."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Final

from helixflow.core.call import Call, Operation

# After so many blocks of a size they are twice as long, up to 95 KiB for blocks of 256 bytes. What two prompts share is
# known to a third at worst, and a decision costs few hashes: 1,000 tokens are 8 of them.
_BLOCKS_OF_A_SIZE: Final = 3
_SIZES: Final = 7
_SESSION: Final = "session"
_FIELDS: Final = {Operation.CHAT: "messages", Operation.COMPLETIONS: "prompt"}


class _Place:
    """A seat, until it is forgotten. `prompts` counts those that were new to it, older ones less."""

    __slots__ = ("known", "prompts", "seat_id")

    def __init__(self, seat_id: str) -> None:
        self.seat_id = seat_id
        self.known = True
        self.prompts = 0.0


class _Generation:
    """Beginnings that were used at about the same time, and where they went."""

    __slots__ = ("entries", "places")

    def __init__(self) -> None:
        self.entries: dict[int, _Place] = {}
        self.places: dict[str, _Place] = {}


class PrefixTable:
    """Hashes of beginnings and the seat that each went to last, at most `entries` of them.

    There are two generations: what is used goes to the young one, and when that holds half of the entries it becomes
    the old one, and what was old and has not been used meanwhile is dropped. (An exact order of use costs several times
    as much, for each call and each of its hashes.)

    Beginnings compare as the bytes that the client sent, in blocks of `block_bytes`, later ones of a multiple. They are
    kept apart by organisation: the caches of engines are shared by all that a replica serves, and whoever is led to
    where a prompt is cached could measure that somebody else has sent it.

    Python's own hash is used: it is keyed by a secret of this process, so that nobody can make beginnings collide; and
    a collision would only cost a cache miss.
    """

    def __init__(self, *, entries: int, block_bytes: int) -> None:
        self._most_young = entries // 2
        sizes = [block_bytes * 2**doubled for doubled in range(_SIZES) for _ in range(_BLOCKS_OF_A_SIZE)]
        self._ends = list(accumulate(sizes))
        self._blocks = [slice(end - size, end) for end, size in zip(self._ends, sizes, strict=True)]
        self._block_bytes = block_bytes
        self._young = _Generation()
        self._old = _Generation()

    def __len__(self) -> int:
        return len(self._young.entries) + len(self._old.entries)

    def chain(self, scope: str, call: Call) -> Sequence[int]:
        """The hashes of the beginnings of the call's prompt, shortest first; none for a short one."""
        field = _FIELDS.get(call.operation)
        raw = call.fields.get(field) if field is not None and self._most_young else None
        if raw is None:
            return ()
        text = bytes(raw)
        size = len(text)
        if size < self._block_bytes:
            return ()
        # Templates put the tools before the messages.
        tools = call.fields.get("tools")
        known = hash((scope, call.principal.organisation_id, bytes(tools) if tools is not None else None))
        return [known := hash((known, text[block])) for block in self._blocks[: bisect_right(self._ends, size)]]

    def session(self, scope: str, call: Call) -> Sequence[int]:
        """The same for the session that the call says it belongs to: one hash, of its own."""
        return (hash((scope, call.principal.organisation_id, call.hints.session, _SESSION)),)

    def find(self, hashes: Sequence[int]) -> tuple[str, int]:
        """The seat of the longest beginning that is known, and how many of `hashes` that is; `("", 0)` for none."""
        young, old = self._young.entries, self._old.entries
        place = young.get(hashes[-1])
        if place is not None and place.known:  # nearly always so for who is found at all
            return place.seat_id, len(hashes)
        found, matched = "", 0
        for number, known in enumerate(hashes, 1):
            place = young.get(known) or old.get(known)
            if place is None:  # and so nothing longer is there: all of a chain is remembered together
                break
            if place.known:
                found, matched = place.seat_id, number
        return found, matched

    def burden(self, seat_id: str) -> float:
        """How many prompts have come to that seat that were new to it: its cache has room for some only."""
        place = self._young.places.get(seat_id) or self._old.places.get(seat_id)
        return 0.0 if place is None else place.prompts

    def remember(self, hashes: Sequence[int], seat_id: str, *, new: bool = True) -> None:
        """All these beginnings are now at that seat; `new` if most of the prompt was not there before."""
        young = self._young
        if len(young.entries) + len(hashes) > self._most_young:
            self._old, self._young = young, _Generation()
            young, hashes = self._young, hashes[: self._most_young]
        place = young.places.get(seat_id)
        if place is None:
            place = young.places[seat_id] = self._old.places.get(seat_id) or _Place(seat_id)
            place.prompts /= 2
        if new:
            place.prompts += 1
        entries = young.entries
        if entries.get(hashes[-1]) is not place or entries.get(hashes[0]) is not place:
            entries.update(dict.fromkeys(hashes, place))

    def forget(self, seat_id: str) -> None:
        """Nothing of it is found any more; its entries go as they grow old."""
        for generation in (self._young, self._old):
            place = generation.places.pop(seat_id, None)
            if place is not None:
                place.known = False
