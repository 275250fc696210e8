"""The identity path: a provider's OpenAI-shaped bytes go to the client as they came, but for the model's name, the
answer's id and the usage rules. Once a stream is under way its events are edited as bytes, nothing is decoded.

Editing bytes is exact because inside JSON strings quotes are escaped: `"model":"x"` never occurs there.
"""

import time

import msgspec
from msgspec import Raw, Struct

from helixflow.core.call import Operation, Progress
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.openai_events import FIELDS, STREAM_EVENT, StreamEvent, UsageBody
from helixflow.dialects.openai_template import ContentTemplate
from helixflow.dialects.provider_errors import error_of, event_refusal, read_error
from helixflow.transport.sse import EventSplitter, data_of

_ABSENT = Raw()
DONE = b"data: [DONE]\n\n"
_USAGE_NULL = b',"usage":null'
CONTENT_FILTER = "content_filter"
_FINISH = b'"finish_reason":"'
_NO_CHOICES = b'"choices":[]'
# Events before the first content say little: a role, a name.
_MAX_HELD_BYTES = 2**20
ID_PREFIX = {Operation.CHAT: b'"chatcmpl-', Operation.COMPLETIONS: b'"cmpl-', Operation.EMBEDDINGS: b""}


class Rename:
    """What to change in every event or answer of one call."""

    __slots__ = ("_call_id", "model", "prefix")

    def __init__(self, public_model: bytes, operation: Operation, call_id: str) -> None:
        """`public_model` is the name that clients know, as JSON."""
        self.model = public_model
        self.prefix = ID_PREFIX[operation]
        self._call_id = call_id

    @property
    def answer_id(self) -> bytes:
        """An id of our own, as JSON."""
        return b'%b%b"' % (self.prefix, self._call_id.encode())

    def pairs(self, model: Raw, answer_id: Raw) -> list[tuple[bytes, bytes, bytes]]:
        """(field, old raw value, new raw value) of what must differ."""
        pairs = []
        if (old := bytes(model)) and old != self.model:
            pairs.append((b"model", old, self.model))
        if self.prefix and (old := bytes(answer_id)) and not old.startswith(self.prefix):
            pairs.append((b"id", old, self.answer_id))
        return pairs


class StreamEditor:
    """Turns pieces of a provider's SSE body into the client's.

    Events before the first content are held until it comes (`started`), so that a failed attempt can still be
    repeated elsewhere; `filtered` when it is only the word of a filter that ended a choice. `done` once the terminal
    event has passed; what follows it is dropped. `failure` is what went wrong after the bytes that `feed` has returned.
    `progress` is filled in on the way.
    """

    def __init__(self, rename: Rename, *, include_usage: bool, progress: Progress) -> None:
        self._rename = rename
        self._include_usage = include_usage
        self._progress = progress
        self._splitter = EventSplitter()
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._replacements: list[tuple[bytes, bytes]] | None = None
        self._template: ContentTemplate | None = None
        self.started = False
        self.filtered = False
        self.done = False
        self.failure: HelixError | None = None

    def feed(self, data: bytes) -> bytes:
        """The client's bytes for these; `b""` while nothing may pass yet.

        Raises `HelixError` UPSTREAM_INVALID for what is not the dialect, UPSTREAM_UNAVAILABLE for an error event; if
        there are bytes before it, they are returned and the error is left in `failure`.
        """
        edited: list[bytes] = []
        if self._template is not None and not self.done and self._splitter.is_empty:
            data = data[self._edit_contents(data, edited) :]
            if not data:
                return self._only_text(b"".join(edited))
        had_started = self.started
        events = self._splitter.feed(data)
        try:
            self._edit_events(events, edited)
        except HelixError as exc:
            self.failure = exc
            if not any(edited):
                raise
        return self._only_text(b"".join(edited), had_started=had_started)

    def _only_text(self, edited: bytes, *, had_started: bool = True) -> bytes:
        """Clients would stumble over anything else: the events before it, and `failure`."""
        position = _first_no_text(edited)
        if position < 0:
            return edited
        self.failure = _no_text()
        self.done = self._progress.complete = False
        good = edited[: edited.rfind(b"\n\n", 0, position) + 2] if b"\n\n" in edited[:position] else b""
        if not good or not had_started:
            raise self.failure
        return good

    def _edit_events(self, events: list[bytes], edited: list[bytes]) -> None:
        joined = False
        position = 0
        while position < len(events) and not self.done:
            if self._template is not None and not joined:
                # What is left of a piece is mostly content: try it together.
                joined = True
                left = b"".join(events[position:])
                done = left.count(b"\n\n", 0, self._edit_contents(left, edited))
                if done:
                    position += done
                    continue
            event = events[position]
            plain = (
                self._edit_bytes(event, self._replacements) if self.started and self._replacements is not None else None
            )
            edited.append(self._edit_event(event) if plain is None else plain)
            position += 1

    def _edit_contents(self, data: bytes, edited: list[bytes]) -> int:
        """Edits the content events that `data` begins with, by template; returns how many bytes they were."""
        assert self._template is not None
        run = self._template.edit(data)
        if run is None:
            return 0
        self._count(run.events)
        edited.append(run.edited)
        return run.size

    @property
    def ended_cleanly(self) -> bool:
        return self.done and not self._splitter.pending.strip()

    def _edit_bytes(self, event: bytes, replacements: list[tuple[bytes, bytes]]) -> bytes | None:
        """Edits one event without decoding it; None when it needs a closer look."""
        whole = event.startswith(b"data: {") and event.endswith(b"}\n\n") and event.count(b"\n") == 2
        if not whole or b'"error"' in event:
            return None
        if self._include_usage:
            if b'"usage"' not in event:
                event = event.replace(b"}\n\n", b',"usage":null}\n\n')
            elif event.count(b'"usage"') != event.count(_USAGE_NULL):
                return None
        elif b'"usage"' in event:
            event = event.replace(_USAGE_NULL, b"")
            if b'"usage"' in event:
                return None
        for old, new in replacements:
            if old not in event:
                return None
            event = event.replace(old, new)
        finish = event.find(_FINISH)
        if finish >= 0:
            start = finish + len(_FINISH)
            self._progress.finish_reason = event[start : event.find(b'"', start)].decode("ascii", "replace")
        elif _NO_CHOICES not in event:
            self._count(1)
        return event

    def _count(self, events: int) -> None:
        """A token each, until the provider says how many there were."""
        usage = self._progress.usage
        if not usage.reported:
            usage.completion_tokens += events

    def _edit_event(self, event: bytes) -> bytes:
        payload = data_of(event)
        if payload is None:
            return event if self.started else b""
        if payload == b"[DONE]":
            self.done = self._progress.complete = True
            return self._release(DONE)
        try:
            fields = FIELDS.decode(payload)
            view = STREAM_EVENT.decode(payload)
        except (msgspec.DecodeError, ValueError, RecursionError) as exc:
            raise HelixError(
                ErrorKind.UPSTREAM_INVALID, "The model's server sent an event that is not valid JSON."
            ) from exc
        if view.error is not None:
            raise event_refusal(error_of(view.error))
        return self._shape(payload, fields, view)

    def _shape(self, payload: bytes, fields: dict[str, Raw], view: StreamEvent) -> bytes:
        changes = self._rename.pairs(fields.get("model", _ABSENT), fields.get("id", _ABSENT))
        # Bytes are edited only where that gives the same as encoding anew: in JSON without spaces.
        if self._replacements is None and view.choices and msgspec.json.encode(fields) == payload:
            self._replacements = [(b'"%b":%b' % (name, old), b'"%b":%b' % (name, new)) for name, old, new in changes]
        if view.has_content:
            if view.has_output:
                self._count(1)
            if self._replacements is not None and msgspec.json.encode(fields) == payload:
                event = b"data: " + payload + b"\n\n"
                self._template = ContentTemplate.learn(event, self._replacements, include_usage=self._include_usage)
        if view.usage is not None:
            view.usage.copy_to(self._progress.usage)
        for choice in view.choices:
            self._progress.finish_reason = choice.finish_reason or self._progress.finish_reason
        if not self._include_usage:
            had_usage = fields.pop("usage", None)
            if view.usage is not None and not view.choices and had_usage is not None:
                return b""
        elif "usage" not in fields:
            fields["usage"] = Raw(b"null")
        for name, _, new in changes:
            fields[name.decode()] = Raw(new)
        edited = b"data: " + msgspec.json.encode(fields) + b"\n\n"
        if self.started or view.has_content:
            if not self.started:
                self._progress.first_content_at = time.perf_counter()
                self.filtered = not view.has_output and self._progress.finish_reason == CONTENT_FILTER
            return self._release(edited)
        self._hold(edited)
        return b""

    def _hold(self, event: bytes) -> None:
        self._held.append(event)
        self._held_bytes += len(event)
        if self._held_bytes > _MAX_HELD_BYTES:
            raise HelixError(ErrorKind.UPSTREAM_INVALID, "The model's server sends events, but no answer.")

    def _release(self, event: bytes) -> bytes:
        self.started = True
        if not self._held:
            return event
        self._held.append(event)
        held, self._held = b"".join(self._held), []
        return held


class _Choice(Struct, frozen=True, gc=False):
    finish_reason: str | None = None


class _Answer(Struct, frozen=True):
    """The fields of a whole answer that matter here; the rest is not even decoded."""

    model: Raw = _ABSENT
    id: Raw = _ABSENT
    usage: UsageBody | None = None
    choices: list[_Choice] | None = None
    data: Raw = _ABSENT
    error: Raw = _ABSENT


_ANSWER = msgspec.json.Decoder(_Answer)


def edit_answer(body: bytes, rename: Rename, progress: Progress) -> bytes:
    """A whole answer with the model's name and the id edited; usage goes to `progress`.

    Raises `HelixError` UPSTREAM_INVALID for what is not a JSON object with an answer in it, and what an error means
    that came in its place.
    """
    try:
        if not (body.isascii() and b"\0" not in body) and _first_no_text(body) >= 0:
            raise _no_text()
        answer = _ANSWER.decode(body)
    except (msgspec.DecodeError, ValueError, RecursionError) as exc:
        raise HelixError(
            ErrorKind.UPSTREAM_INVALID, "The model's server sent an answer that is not valid JSON."
        ) from exc
    if answer.choices:
        progress.finish_reason = answer.choices[0].finish_reason
    elif answer.choices is None and answer.data is _ABSENT:
        if bytes(answer.error) not in (b"", b"null"):
            raise event_refusal(read_error(body))
        raise HelixError(ErrorKind.UPSTREAM_INVALID, "The model's server sent something that is not an answer.")
    if answer.usage is not None:
        answer.usage.copy_to(progress.usage)
    if (model := bytes(answer.model)) and model != rename.model:
        body = _replace(body, b"model", model, rename.model)
    if rename.prefix and (answer_id := bytes(answer.id)) and not answer_id.startswith(rename.prefix):
        body = _replace(body, b"id", answer_id, rename.answer_id)
    return body


def _first_no_text(data: bytes) -> int:
    """Where it stops to be text; -1 where all of it is. What is not decoded is not known to be."""
    try:
        if not data.isascii():
            data.decode()
    except UnicodeDecodeError as exc:
        return exc.start
    return data.find(b"\0")


def _no_text() -> HelixError:
    return HelixError(ErrorKind.UPSTREAM_INVALID, "The model's server sent bytes that are no text.")


def _replace(body: bytes, name: bytes, old: bytes, new: bytes) -> bytes:
    edited = body.replace(b'"%b":%b' % (name, old), b'"%b":%b' % (name, new))
    if edited == body:  # another spelling of the same JSON
        fields = FIELDS.decode(body)
        fields[name.decode()] = Raw(new)
        edited = msgspec.json.encode(fields)
    return edited
