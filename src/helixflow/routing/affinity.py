"""Which seat probably still has the beginning of a prompt in its cache: a bounded memory of where beginnings went."""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Final

from helixflow.core.call import Call, Operation

# After so many blocks of a size they are twice as long, up to 63 KiB for blocks of 256 bytes. What two prompts share is
# known to a quarter at worst, and a decision costs few hashes: 1,000 tokens are 10 of them.
_BLOCKS_OF_A_SIZE: Final = 4
_SIZES: Final = 6
_SESSION: Final = "session"
_FIELDS: Final = {Operation.CHAT: "messages", Operation.COMPLETIONS: "prompt"}


class _Place:
    """A seat, for as long as something is remembered of it. `entries` is 0 once it is forgotten."""

    __slots__ = ("entries", "seat_id")

    def __init__(self, seat_id: str) -> None:
        self.seat_id = seat_id
        self.entries = 0


class PrefixTable:
    """Hashes of beginnings and the seat that each went to last; the least recently used ones are dropped.

    Beginnings compare as the bytes that the client sent, in blocks of `block_bytes`, later ones of a multiple. They are
    kept apart by organisation: the caches of engines are shared by all that a replica serves, and whoever is led to
    where a prompt is cached could measure that somebody else has sent it.

    Python's own hash is used: it is keyed by a secret of this process, so that nobody can make beginnings collide; and
    a collision would only cost a cache miss.
    """

    def __init__(self, *, entries: int, block_bytes: int) -> None:
        self._most = entries
        sizes = [block_bytes * 2**doubled for doubled in range(_SIZES) for _ in range(_BLOCKS_OF_A_SIZE)]
        self._ends = list(accumulate(sizes))
        self._blocks = [slice(end - size, end) for end, size in zip(self._ends, sizes, strict=True)]
        self._block_bytes = block_bytes
        self._places: dict[str, _Place] = {}
        self._entries: OrderedDict[int, _Place] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[int]:
        return iter(self._entries)

    def chain(self, scope: str, call: Call) -> Sequence[int]:
        """The hashes of the beginnings of the call's prompt, shortest first; none for a short one."""
        field = _FIELDS.get(call.operation)
        raw = call.fields.get(field) if field is not None and self._most else None
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
        entries = self._entries
        found, matched = "", 0
        for number, known in enumerate(hashes, 1):
            place = entries.get(known)
            if place is None:  # and so nothing longer is there
                break
            if place.entries:
                found, matched = place.seat_id, number
        return found, matched

    def remember(self, hashes: Sequence[int], seat_id: str) -> None:
        """All these beginnings, at least one, are now at that seat."""
        if not self._most:
            return
        place = self._places.get(seat_id)
        if place is None:
            place = self._places[seat_id] = _Place(seat_id)
        entries = self._entries
        # Longest first: they are dropped in this order, so that nothing is there without all that is shorter.
        if entries.get(hashes[-1]) is place:
            for known in reversed(hashes):
                entries.move_to_end(known)
            return
        for known in reversed(hashes):
            before = entries.get(known)
            entries[known] = place
            if before is None:
                place.entries += 1
            else:
                entries.move_to_end(known)
                if before is not place:
                    place.entries += 1
                    self._leave(before)
        while len(entries) > self._most:
            self._leave(entries.popitem(last=False)[1])

    def forget(self, seat_id: str) -> None:
        """Nothing of it is found any more; its entries go as they grow old."""
        place = self._places.pop(seat_id, None)
        if place is not None:
            place.entries = 0

    def _leave(self, place: _Place) -> None:
        if place.entries:  # else it is forgotten already
            place.entries -= 1
            if not place.entries:
                del self._places[place.seat_id]
