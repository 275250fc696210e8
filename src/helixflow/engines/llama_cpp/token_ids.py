"""Which tokens llama.cpp has made, read from the bytes of its events without decoding them.

Chat events name an id only with log-probabilities, and the number of tokens only with timings; those after sampling
(`post_sampling_probs`) cost nothing measurable, and the tokens are the same with and without. Completions name both
where they are `verbose`. Events that are read come out short, in the form that `chat` and `completions` know.
"""

from typing import Final, Protocol

from msgspec import Raw

from helixflow.engines.resuming import TokenLog

_TRUE: Final = Raw(b"true")
# What makes events name tokens.
CHAT_FIELDS: Final = {
    "logprobs": _TRUE,
    "top_logprobs": Raw(b"1"),
    "post_sampling_probs": _TRUE,
    "timings_per_token": _TRUE,
}
COMPLETION_FIELDS: Final = {"verbose": _TRUE}

# Quotes inside JSON strings are escaped, so what follows a text is found by its quotes.
_CHAT_START: Final = b'{"choices":[{"finish_reason":null,"index":0,"delta":{"content":"'
_CHAT_END: Final = b'"}}]}'
_CHAT_TEXT: Final = len(_CHAT_START)
_CHAT_ID: Final = b'"},"logprobs":{"content":[{"id":'
_CHAT_RAW: Final = b',"token":"'
_CHAT_RAW_END: Final = b'","bytes":'
_CHAT_MADE: Final = b'"predicted_n":'
_CHAT_ROLE: Final = b'{"choices":[{"finish_reason":null,"index":0,"delta":{"role":'
_CHAT_FINISH: Final = b'{"choices":[{"finish_reason":"'
_TEXT_START: Final = b'{"choices":[{"text":"'
_TEXT_END: Final = b'","index":0,"logprobs":null,"finish_reason":null}]}'
_TEXT_FOLLOWS: Final = b'","index":0,"logprobs":null,"finish_reason":'
_TEXT_ID: Final = b'"tokens":['
_TEXT_MADE: Final = b'"tokens_predicted":'
_NO_CHOICE: Final = b'{"choices":[],'


class TokenReader(Protocol):
    """Reads the events of one generation into a log. `is_readable` until one had content and no token; `finished` once
    one has said why the answer ends.
    """

    is_readable: bool
    finished: bool

    def read(self, event: bytes) -> bytes | None:
        """The text of an event that is noted now, as it stands in its JSON; None for any other event."""
        ...


class ChatTokens:
    """Of `/v1/chat/completions` with `CHAT_FIELDS`."""

    def __init__(self, log: TokenLog) -> None:
        self._log = log
        self.is_readable = True
        self.finished = False

    def read(self, event: bytes) -> bytes | None:
        end = event.find(_CHAT_ID)
        if end > 0 and event.startswith(_CHAT_START):
            text = event[_CHAT_TEXT:end]
            token_at = end + len(_CHAT_ID)
            token_end = event.find(_CHAT_RAW, token_at)
            raw_at = token_end + len(_CHAT_RAW)
            made_at = event.rfind(_CHAT_MADE) + len(_CHAT_MADE)
            # The engine's parser may hold back or leave out what the model wrote: then ids and text do not fit.
            if event.startswith(text, raw_at) and event.startswith(_CHAT_RAW_END, raw_at + len(text)):
                try:
                    self._log.note(
                        text, int(event[token_at:token_end]), int(event[made_at : event.find(b",", made_at)])
                    )
                except ValueError:
                    self.is_readable = False
                return text
        if event.startswith(_CHAT_FINISH):
            self.finished = True
        elif not event.startswith((_NO_CHOICE, _CHAT_ROLE)):
            self.is_readable = False
        return None


class CompletionTokens:
    """Of `/v1/completions` with `COMPLETION_FIELDS`."""

    def __init__(self, log: TokenLog) -> None:
        self._log = log
        self.is_readable = True
        self.finished = False

    def read(self, event: bytes) -> bytes | None:
        end = event.find(_TEXT_FOLLOWS)
        if end > 0 and event.startswith(_TEXT_START):
            reason_at = end + len(_TEXT_FOLLOWS)
            if not event.startswith(b"null", reason_at):
                self.finished = True
                return None
            text = event[len(_TEXT_START) : end]
            token_at = event.rfind(_TEXT_ID) + len(_TEXT_ID)
            made_at = event.rfind(_TEXT_MADE) + len(_TEXT_MADE)
            try:
                token = int(event[token_at : event.find(b"]", token_at)])
                self._log.note(text, token, int(event[made_at : event.find(b",", made_at)]))
            except ValueError:
                self.is_readable = False
            return text
        if not event.startswith(_NO_CHOICE):
            self.is_readable = False
        return None


def chat_event(text: bytes) -> bytes:
    """A chat event with this content, which is the inside of a JSON string."""
    return _CHAT_START + text + _CHAT_END


def completion_event(text: bytes) -> bytes:
    """The same for completions."""
    return _TEXT_START + text + _TEXT_END
