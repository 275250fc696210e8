"""What all content events of one stream have in common, so that editing many takes a few passes over their bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

_CHOICES = b'"choices":['
_USAGE_NULL = b',"usage":null'
_FINISH = b'"finish_reason":"'


class EditedRun(NamedTuple):
    """`events` events, the first `size` bytes of what was given, as they are to go out."""

    edited: bytes
    size: int
    events: int


@dataclass(frozen=True, slots=True)
class ContentTemplate:
    """An event that begins with `start` and ends with `end` is edited by putting `new_start` and `new_end` there.

    `joint` and `new_joint` are an end and a start next to each other, as between two events.
    """

    start: bytes
    end: bytes
    joint: bytes
    new_start: bytes
    new_end: bytes
    new_joint: bytes

    @classmethod
    def learn(
        cls, event: bytes, replacements: Sequence[tuple[bytes, bytes]], *, include_usage: bool
    ) -> "ContentTemplate | None":
        """From a content event (one line of JSON without spaces); None where it is of an unusual form."""
        choices = event.find(_CHOICES)
        close = event.rfind(b"]")
        if choices < 0 or close < choices or b'"usage"' in event[:close]:
            return None
        start, end = event[: choices + len(_CHOICES)], event[close:]
        if any((start + end).count(old) != 1 or old in event[len(start) : close] for old, _ in replacements):
            return None
        new_start, new_end = start, end
        for old, new in replacements:
            new_start, new_end = new_start.replace(old, new), new_end.replace(old, new)
        if not include_usage:
            new_end = new_end.replace(_USAGE_NULL, b"")
        elif b'"usage"' not in end:
            new_end = new_end.removesuffix(b"}\n\n") + b',"usage":null}\n\n'
        if (b'"usage"' in new_end) != include_usage:
            return None
        return cls(start, end, end + start, new_start, new_end, new_end + new_start)

    def edit(self, data: bytes) -> EditedRun | None:
        """The run of events of exactly this form that `data` begins with.

        None when it begins otherwise. An event that says why its choice ends is not one of them: that is to be seen.
        """
        start, end = self.start, self.end
        if not data.startswith(start):
            return None
        finish = data.find(_FINISH)
        size = data.rfind(end, 0, finish if finish >= 0 else len(data)) + len(end)
        if size < len(start) + len(end):
            return None
        run = data if size == len(data) else data[:size]
        events = run.count(self.joint) + 1
        if run.count(b"\n") != 2 * events:
            return None
        inner = run[len(start) : size - len(end)]
        if events > 1:
            inner = inner.replace(self.joint, self.new_joint)
        return EditedRun(self.new_start + inner + self.new_end, size, events)
