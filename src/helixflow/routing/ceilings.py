"""What a deployment may be asked for at once and in a minute, so that a provider's limits are not overrun. No I/O."""

from typing import Final

from helixflow.core.call import Call
from helixflow.core.capacity import ProviderLimits
from helixflow.core.clock import Clock
from helixflow.settings.deployments import RoutedDeployment

WINDOW_S: Final = 60
# A place that is taken is freed by the end of an answer: nobody knows when.
_PLACE_WAIT_S: Final = 0.5
_BYTES_A_TOKEN: Final = 4
# Of an answer whose request does not say how long it may be.
_USUAL_ANSWER_TOKENS: Final = 256


class Ceiling:
    """The ceilings of one deployment in one gateway: concurrency, requests and tokens a minute.

    With several gateways each takes its share, `ceiling / gateways`, at least 1: together they may exceed a ceiling
    that is smaller than their number, and one that has more to do than the others cannot use what they leave.

    In no 60 s are more requests begun, or tokens expected, than the ceiling says. What the provider itself says
    (`limits`, filled in by the engine; `refuse` for a 429) holds too. Ask `wait_s`, then `enter`, in the same turn of
    the loop; then `leave`, once. While `is_active` is False none of that is needed.
    """

    __slots__ = ("_clock", "_concurrency", "_in_flight", "_limits", "_refused_until", "_requests", "_tokens")

    def __init__(
        self, settings: RoutedDeployment, clock: Clock, *, gateways: int = 1, limits: ProviderLimits | None = None
    ) -> None:
        self._clock = clock
        self._concurrency = _share(settings.max_concurrency, gateways)
        requests, tokens = (_share(n, gateways) for n in (settings.requests_per_minute, settings.tokens_per_minute))
        self._requests = _Window(requests) if requests is not None else None
        self._tokens = _Window(tokens) if tokens is not None else None
        self._limits = limits
        self._in_flight = 0
        self._refused_until = 0.0

    @property
    def is_active(self) -> bool:
        """Whether there is, or may come to be, any ceiling."""
        raise NotImplementedError

    @property
    def counts_tokens(self) -> bool:
        """Whether the tokens that are given matter; 0 will do otherwise (see `expected_tokens`)."""
        raise NotImplementedError

    def wait_s(self, tokens: int) -> float:
        """Seconds until a call of so many tokens, prompt and answer, may enter; 0.0: now."""
        raise NotImplementedError

    def enter(self, tokens: int) -> int:
        """Takes the place, whatever `wait_s` says. What it gives is for `leave`."""
        raise NotImplementedError

    def leave(self, entry: int, tokens: int, used: int | None = None) -> None:
        """The call has ended, having `used` so many tokens of those that it entered with; None: nobody knows."""
        raise NotImplementedError

    def refuse(self, retry_after_s: float) -> None:
        """The provider refused a call as one too many (429): nothing is sent before that time is over."""
        raise NotImplementedError


def expected_tokens(call: Call) -> int:
    """Tokens that a call will use, prompt and answer: as providers estimate it, by what it says of its length."""
    raise NotImplementedError
