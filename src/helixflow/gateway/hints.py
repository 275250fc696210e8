"""What a request's own headers say about how it is to be served: session, residency, deadline."""

import re
from collections.abc import Mapping, Sequence
from typing import Final

from helixflow.core.call import NO_HINTS, Hints
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.openai_chat import ChatParams
from helixflow.dialects.openai_completions import CompletionParams
from helixflow.dialects.openai_embeddings import EmbeddingParams

_SESSION: Final = b"x-helixflow-session"
_RESIDENCY: Final = b"x-helixflow-residency"
TIMEOUT: Final = b"x-helixflow-timeout-ms"
_MAX_SESSION_BYTES: Final = 256
_REGION: Final = re.compile(rb"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
_DIGITS: Final = re.compile(rb"[0-9]{1,9}")


def read_hints(
    headers: Mapping[bytes, bytes],
    params: ChatParams | CompletionParams | EmbeddingParams,
    lines: Sequence[tuple[bytes, bytes]] = (),
) -> Hints:
    """Raises `HelixError` INVALID_VALUE, with the header's name, for what cannot be a session or a region.

    `headers` has the last of the `lines` of each name. A residency that is not understood, or is said twice, must not
    be left out: the data would go where it may not.
    """
    session, residency, user = headers.get(_SESSION), headers.get(_RESIDENCY), params.user
    if session is None and residency is None and user is None:
        return NO_HINTS
    if session is not None and not 0 < len(session) <= _MAX_SESSION_BYTES:
        raise _invalid(_SESSION, f"has 1 to {_MAX_SESSION_BYTES} characters")
    if residency is not None and not _REGION.fullmatch(residency):
        raise _invalid(_RESIDENCY, "is a region such as 'eu': a-z, 0-9, '.', '_' and '-'")
    if residency is not None and sum(name == _RESIDENCY for name, _ in lines) > 1:
        raise _invalid(_RESIDENCY, "is given once")
    return Hints((session or b"").decode("latin-1"), user or "", (residency or b"").decode("ascii"))


def read_timeout(headers: Mapping[bytes, bytes], longest_s: float) -> float:
    """Seconds that the request may take: what it says, `longest_s` at most. Raises `HelixError` INVALID_VALUE."""
    text = headers.get(TIMEOUT)
    if text is None:
        return longest_s
    if not _DIGITS.fullmatch(text) or int(text) == 0:
        raise _invalid(TIMEOUT, "is a whole number of milliseconds, 1 or more")
    return min(int(text) / 1000, longest_s)


def _invalid(header: bytes, rule: str) -> HelixError:
    name = header.decode("ascii")
    return HelixError(ErrorKind.INVALID_VALUE, f"Invalid request: the header {name} {rule}.", param=name)
