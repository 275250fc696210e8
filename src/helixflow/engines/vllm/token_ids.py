"""Which tokens vLLM has read and made, taken out of the bytes of its events without decoding them.

With `return_token_ids` the first event names the prompt's and each event the tokens that it stands for, those included
whose text is still held back. Quotes inside JSON strings are escaped, so a field is found by its name and its quotes.
"""

from typing import Final

from helixflow.transport.sse import EventSplitter

_MADE: Final = b',"token_ids":['
_PROMPT: Final = b',"prompt_token_ids":['
# What comes along and says nothing: fields of these names.
_ABSENT: Final = b',"prompt_'
_EMPTY: Final = (b',"prompt_text":null', b',"prompt_token_ids":null')
_NO_CONTENT: Final = b'"content":""'
_NO_TEXT: Final = b'"text":""'
_FINISHED: Final = b'"finish_reason":"'
_NO_CHOICE: Final = b'"choices":[],'
_FAILED: Final = b'data: {"error":'
_DONE: Final = b"data: [DONE]"


class TokenEvents:
    """Reads the body of one streamed answer. What is read is kept as text: it is needed only when a replica is lost.

    `made` counts tokens. `finished` once an event has said why the answer ends, `counted` once one has told the usage,
    `done` after the last one; `failure` is an event with an error, which is not passed on.
    """

    __slots__ = ("_held", "_made", "_prompt", "_splitter", "counted", "done", "failure", "finished", "made")

    def __init__(self) -> None:
        self._splitter = EventSplitter()
        self._prompt = b""
        self._made: list[bytes] = []
        # How many of the newest pieces of ids have no text yet.
        self._held = 0
        self.made = 0
        self.finished = False
        self.counted = False
        self.done = False
        self.failure = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The events that `data` completes, without token ids."""
        events: list[bytes] = []
        for event in self._splitter.feed(data):
            at = event.rfind(_MADE)
            if at >= 0:
                start = at + len(_MADE)
                end = event.find(b"]", start)
                if end > start:
                    self._made.append(event[start:end])
                    self._held = self._held + 1 if _NO_CONTENT in event or _NO_TEXT in event else 0
                    self.made += event.count(b",", start, end) + 1
                event = event[:at] + event[end + 1 :]
            elif event.startswith(_FAILED):
                self.failure = event
                return events
            elif event.startswith(_DONE):
                self.done = True
            elif _NO_CHOICE in event:
                self.counted = True
            if not self._prompt:
                event = self._take_prompt(event)
            if _ABSENT in event:
                for field in _EMPTY:
                    event = event.replace(field, b"")
            if _FINISHED in event:
                self.finished = True
            events.append(event)
        return events

    @property
    def prompt(self) -> list[int]:
        """Ids of the prompt; empty before they are known, or where they are not told."""
        return _ids(self._prompt)

    @property
    def prompt_tokens(self) -> int:
        """How many those are."""
        return self._prompt.count(b",") + 1 if self._prompt else 0

    @property
    def ids(self) -> list[int]:
        """Those that were made and whose text has come: one of a character that is not complete has none yet. All of
        them once the answer is finished.
        """
        whole = self._made if self.finished or not self._held else self._made[: -self._held]
        return [number for piece in whole for number in _ids(piece)]

    def _take_prompt(self, event: bytes) -> bytes:
        at = event.find(_PROMPT)
        if at < 0:
            return event
        start = at + len(_PROMPT)
        end = event.find(b"]", start)
        self._prompt = event[start:end]
        return event[:at] + event[end + 1 :]


def _ids(text: bytes) -> list[int]:
    return [int(number) for number in text.split(b",")] if text else []
