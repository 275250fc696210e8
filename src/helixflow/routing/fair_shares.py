"""Counters of virtual tokens: who has had how much of something shared, in proportion to what it weighs. No I/O."""

import heapq
from collections import OrderedDict
from typing import Any, Final

# Listings of a line that are out of date are dropped when they come up, or when there are more than these.
_SPARE_LISTINGS: Final = 64


class Account:
    """The counter of an organisation, with those of its keys below it, or of a key.

    `virtual` is tokens by weight: those that were used, and those `reserved` for requests that run. `floor` is what the
    key served last had used: keys that come (back) begin there. `lines` are those, by priority, in which somebody waits
    on this account.
    """

    __slots__ = ("floor", "keys", "lines", "reserved", "virtual", "weight")

    def __init__(self, virtual: float, weight: float) -> None:
        self.virtual = virtual
        self.reserved = 0.0
        self.weight = weight
        self.floor = 0.0
        self.keys: dict[str, Account] = {}
        self.lines: dict[int, Line] = {}

    @property
    def used(self) -> float:
        return self.virtual - self.reserved

    def reserve(self, tokens: float) -> None:
        self.virtual += tokens / self.weight
        self.reserved += tokens / self.weight

    def charge(self, tokens: float, settled: float) -> None:
        """`settled` of what was reserved is used now, and `tokens` more, or less."""
        self.reserved = max(0.0, self.reserved - settled / self.weight)
        self.virtual += tokens / self.weight
        if tokens < 0:
            for line in self.lines.values():
                line.advance()

    def lift(self, floor: float) -> None:
        """Nobody has credit for having been idle."""
        self.virtual = max(self.virtual, floor + self.reserved)


class Line:
    """Those who wait at one priority: of everybody (its members are organisations), of an organisation (its members are
    keys) or of a key (`entries`, in the order in which they came).

    `count` is how many wait, `weight` the sum over the members.
    """

    __slots__ = (
        "_heap",
        "_sequence",
        "account",
        "count",
        "entries",
        "listed",
        "members",
        "parent",
        "priority",
        "weight",
    )

    def __init__(self, priority: int, parent: "Line | None", account: Account | None) -> None:
        self.priority = priority
        self.parent = parent
        self.account = account
        self.count = 0
        self.weight = 0.0
        self.members: dict[str, Line] = {}
        self.entries: OrderedDict[Any, None] = OrderedDict()
        # The counter at which the parent has it. Counters mostly grow: a listing is corrected when it comes up.
        self.listed = account.virtual if account is not None else 0.0
        self._heap: list[tuple[float, int, Line]] = []
        self._sequence = 0
        if account is not None:
            account.lines[priority] = self

    def member(self, name: str, account: Account) -> "Line":
        """The member of this name, made if nobody of it waits yet."""
        line = self.members.get(name)
        if line is None:
            line = self.members[name] = Line(self.priority, self, account)
            self.weight += account.weight
            self._list(line)
        return line

    def drop(self, name: str, weight: float) -> None:
        """Nobody waits any more in the member of this name, which came with `weight`."""
        line = self.members.pop(name)
        assert line.account is not None
        del line.account.lines[self.priority]
        self.weight -= weight
        if not self.members:
            self.weight = 0.0
            self._heap.clear()

    def lead(self) -> "Line":
        """The member that has had least. Call it while somebody waits."""
        heap = self._heap
        while True:
            listed, _, line = heap[0]
            account = line.account
            assert account is not None
            if account.lines.get(self.priority) is not line or listed != line.listed:
                heapq.heappop(heap)
            elif account.virtual > listed:
                line.listed = account.virtual
                self._sequence += 1
                heapq.heapreplace(heap, (line.listed, self._sequence, line))
            else:
                return line

    def advance(self) -> None:
        """Its account was given tokens back: it may come up earlier."""
        assert self.account is not None
        if self.parent is not None and self.account.virtual < self.listed:
            self.listed = self.account.virtual
            self.parent._list(self)

    def _list(self, line: "Line") -> None:
        self._sequence += 1
        heap = self._heap
        heapq.heappush(heap, (line.listed, self._sequence, line))
        if len(heap) > 2 * len(self.members) + _SPARE_LISTINGS:
            self._heap = [(one.listed, rank, one) for rank, one in enumerate(self.members.values())]
            heapq.heapify(self._heap)
            self._sequence = len(self._heap)
