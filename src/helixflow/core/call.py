"""One request on its way through the gateway, and the answer on its way back."""

from collections.abc import Awaitable, Sequence
from enum import Enum
from typing import Protocol

import msgspec

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.principal import Principal


class Operation(Enum):
    """What is asked of a model. The value is the path under `/v1`."""

    CHAT = "chat/completions"
    COMPLETIONS = "completions"
    EMBEDDINGS = "embeddings"

    __hash__ = object.__hash__  # members are unique objects; Enum's own is Python, and on the hot path


class Usage(msgspec.Struct, gc=False):
    """Tokens of one answer; not `reported` while we only counted them ourselves."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    reported: bool = False


class SideUsage(msgspec.Struct, frozen=True, gc=False):
    """What a deployment has used for a call that another one answered. `engine_ms` is how long it worked on it.

    Not `usage.reported`: counted so far; a prompt of 0 tokens is then one that was sent and not counted.
    """

    deployment: str
    usage: Usage
    engine_ms: int


class Progress(msgspec.Struct):
    """What is known of an answer so far; filled in while it is made, so that it is right whenever the call ends, and
    however. `deployment` is the one tried last, `attempts` those before it, each with the code of its error.

    `first_content_at` is on `time.perf_counter`'s clock, None until the first content, tool or reasoning delta, and so
    is `engine_began_at`, when the deployment began to work on it: what is before is waiting. `complete` once all of a
    streamed answer has been read. `resumed` counts the replicas that were lost under the stream and replaced.
    `failure` is the kind of the error that ended a stream after it had begun: set by who reads it, before it is closed.
    `side_usage` is what other deployments charge for the same call beside `usage`: the losers of hedging.
    """

    deployment: str = ""
    usage: Usage = msgspec.field(default_factory=Usage)
    first_content_at: float | None = None
    finish_reason: str | None = None
    engine_began_at: float | None = None
    complete: bool = False
    attempts: tuple[tuple[str, str], ...] = ()
    resumed: int = 0
    failure: ErrorKind | None = None
    side_usage: tuple[SideUsage, ...] = ()


class Hints(msgspec.Struct, frozen=True, gc=False):
    """What a request says about where it should be served; empty strings for nothing.

    Requests of one `session` go to the same replica while it lives, those of one `user` the same way of a split.
    `residency` is the only region that may serve it, beside those that its model and its caller demand.
    """

    session: str = ""
    user: str = ""
    residency: str = ""


NO_HINTS = Hints()


class Meter(msgspec.Struct, frozen=True, gc=False):
    """The state of a rate limit: what is left of it, and seconds until all of it is there again."""

    limit: int
    remaining: int
    reset_s: float


class Ticket(Protocol):
    """Leave to make a call; whoever got it ends it, once: what comes after the first end has no effect.

    `requests` and `tokens` are the states of the tightest limits of their kinds, None without one. What an end gives is
    None, or to be awaited before the client may see the end of its answer.
    """

    requests: Meter | None
    tokens: Meter | None

    def complete(self) -> Awaitable[None] | None:
        """The answer is whole."""
        ...

    def fail(self, error: HelixError) -> None:
        """It ended in an error."""
        ...

    def cancel(self) -> None:
        """The client, or this process, gave up."""
        ...


class Plan(msgspec.Struct, frozen=True, gc=False):
    """What a call may cost at most: one of these deployments, so many `attempts` of which may be billed (2 where a slow
    one is hedged); the largest context among them, in tokens.
    """

    deployments: Sequence[str] = ()
    context: int = 0
    attempts: int = 1


NO_PLAN = Plan()


class CallRoute(Protocol):
    """What the name that a call asks for leads to. The router makes it, and it never changes."""

    @property
    def plan(self) -> Plan: ...


class Call(msgspec.Struct):
    """A validated request.

    `call_id` is ours and identifies the work in every record; `request_id` is what the client may have chosen and is
    only an attribute. `fields` holds the request's top-level JSON fields as raw bytes with duplicates resolved
    (last wins); `params` is the typed view of the same bytes (`ChatParams`, `CompletionParams` or
    `EmbeddingParams` of `dialects`). `deadline` is on the event loop's clock, seconds. `body_bytes` is the size of the
    request's body. `model` is the model's own name, `alias` the one that the client asked for if that is another.
    `ticket` is set once the call is admitted; None where nothing is metered. `route` is what the model led to when the
    request came: the call is admitted for that and served by it, whatever is configured meanwhile; None before anybody
    has looked.
    """

    call_id: str
    request_id: str
    principal: Principal
    operation: Operation
    model: str
    fields: dict[str, msgspec.Raw]
    params: msgspec.Struct
    stream: bool
    include_usage: bool
    deadline: float
    body_bytes: int = 0
    progress: Progress = msgspec.field(default_factory=Progress)
    ticket: Ticket | None = None
    hints: Hints = NO_HINTS
    alias: str = ""
    route: CallRoute | None = None

    @property
    def public_model(self) -> str:
        """The name that the answer gives to the model: the client's."""
        return self.alias or self.model


class Stream(Protocol):
    """An answer under way.

    For streamed calls `read` gives pieces of the dialect's SSE body, whole events only; otherwise pieces of one JSON
    document. An error after the first piece is raised as `HelixError` from `read`.
    """

    async def read(self) -> bytes:
        """The next piece, or `b""` once the answer is complete."""
        ...

    def close(self) -> None:
        """Ends the generation at once if it still runs. Idempotent; never raises."""
        ...


class Completer(Protocol):
    """Anything that turns a call into an answer: an engine, or a room wrapped around engines."""

    async def open(self, call: Call) -> Stream:
        """Returns once the answer has begun (its first content is at hand); raises `HelixError` before that."""
        ...
