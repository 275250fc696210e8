"""From a public model name to the first deployment that answers."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from helixflow.core.call import Call, Completer, Stream, Usage
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.routing.breaker import Breaker

# What says that another deployment may do better. A client's own mistakes are not repeated elsewhere.
_ELSEWHERE = frozenset(
    {
        ErrorKind.UPSTREAM_UNAVAILABLE,
        ErrorKind.UPSTREAM_INVALID,
        ErrorKind.OVERLOADED,
        ErrorKind.LOADING,
        ErrorKind.RATE_LIMITED,
    }
)
_FAULTS = frozenset({ErrorKind.UPSTREAM_UNAVAILABLE, ErrorKind.UPSTREAM_INVALID})


@dataclass(frozen=True, slots=True)
class Target:
    """A deployment that can be tried."""

    deployment: str
    engine: Completer
    breaker: Breaker


@dataclass(frozen=True, slots=True)
class Route:
    """A public model and its deployments in order of preference. `created` is in seconds since the epoch."""

    model: str
    targets: Sequence[Target]
    owned_by: str = "helixflow"
    created: int = field(default=0)


class Router:
    """Implements `Completer` over routes."""

    def __init__(self, routes: Mapping[str, Route]) -> None:
        self._routes = routes

    @property
    def routes(self) -> Mapping[str, Route]:
        return self._routes

    def route(self, model: str, *, among: Collection[str] | None = None) -> Route:
        """Raises `HelixError` MODEL_NOT_FOUND naming close matches; as if there were only the models `among` those."""
        route = self._routes.get(model)
        if route is not None and (among is None or model in among):
            return route
        known = [name for name in self._routes if among is None or name in among]
        close = difflib.get_close_matches(model[:256], known, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else " GET /v1/models lists them."
        raise HelixError(ErrorKind.MODEL_NOT_FOUND, f"The model '{model[:256]}' does not exist.{hint}", param="model")

    async def open(self, call: Call) -> Stream:
        """Tries the model's deployments until one's first content is at hand; nothing has reached the client before."""
        targets = self.route(call.model).targets
        if len(targets) > 1:
            targets = sorted(targets, key=lambda target: target.breaker.is_open)
        last = len(targets) - 1
        progress = call.progress
        for position, target in enumerate(targets):
            breaker = target.breaker
            breaker.begin()
            progress.deployment = target.deployment
            progress.engine_began_at = None
            try:
                stream = await target.engine.open(call)
            except HelixError as exc:
                if exc.kind in _FAULTS:
                    breaker.fail()
                else:
                    breaker.abandon()
                if position == last or exc.kind not in _ELSEWHERE:
                    raise
                progress.attempts += ((target.deployment, exc.code),)
                # What it made is thrown away, and nobody pays for it.
                progress.usage = Usage()
                progress.first_content_at = progress.finish_reason = None
                progress.complete = False
            except BaseException:
                breaker.abandon()
                raise
            else:
                breaker.succeed()
                return stream
        raise HelixError(ErrorKind.UNAVAILABLE, f"The model '{call.model}' has no deployments.")
