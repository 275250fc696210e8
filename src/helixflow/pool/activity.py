"""Whether a deployment is used: what the pool asks before it takes a model out of memory."""

from collections.abc import Callable, Mapping
from typing import Protocol


class Activity(Protocol):
    """Who knows of running generations: the broker that grants slots."""

    def busy(self, deployment: str) -> int:
        """Slots with a running generation, and requests that wait for one, over all gateways."""
        ...

    def busy_slots(self, deployment: str) -> Mapping[str, int]:
        """Slots with a running generation, by replica; a replica without any may be missing."""
        ...

    def last_used(self, deployment: str) -> float:
        """When the last generation of it ended, on the monotonic clock; 0 for never. Of use while it is not busy."""
        ...

    def on_idle(self, callback: Callable[[str], None]) -> None:
        """`callback` is called with a deployment's name whenever it is busy no more. It must not block."""
        ...


class NoActivity:
    """Nobody tells: only what engines themselves say counts."""

    def busy(self, deployment: str) -> int:
        return 0

    def busy_slots(self, deployment: str) -> Mapping[str, int]:
        return {}

    def last_used(self, deployment: str) -> float:
        return 0.0

    def on_idle(self, callback: Callable[[str], None]) -> None:
        """There is nothing to tell."""
