"""What all content events of one stream have in common, so that editing one takes two comparisons and a join."""

from collections.abc import Sequence
from dataclasses import dataclass

_CHOICES = b'"choices":['
_USAGE_NULL = b',"usage":null'
_FINISH = b'"finish_reason":"'


@dataclass(frozen=True, slots=True)
class ContentTemplate:
    """An event that begins with `start` and ends with `end` is edited by putting `new_start` and `new_end` there."""

    start: bytes
    end: bytes
    new_start: bytes
    new_end: bytes

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
        return cls(start, end, new_start, new_end)

    def edit(self, event: bytes) -> bytes | None:
        """The edited event; None when `event` is not exactly one of this form, or says why its choice ends."""
        start, end = self.start, self.end
        if (
            event.startswith(start)
            and event.endswith(end)
            and len(event) >= len(start) + len(end)
            and event.count(b"\n") == 2
            and _FINISH not in event
        ):
            return self.new_start + event[len(start) : len(event) - len(end)] + self.new_end
        return None
