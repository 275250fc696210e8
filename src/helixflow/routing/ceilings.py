"""What a deployment may be asked for at once and in a minute, so that a provider's limits are not overrun. No I/O."""

import math
from typing import Final

from helixflow.core.call import Call
from helixflow.core.capacity import ProviderLimits
from helixflow.core.clock import Clock
from helixflow.dialects.openai_chat import ChatParams
from helixflow.dialects.openai_completions import CompletionParams
from helixflow.settings.deployments import RoutedDeployment

WINDOW_S: Final = 60
# A place is freed by the end of an answer: nobody knows when.
_PLACE_WAIT_S: Final = 0.5
# A provider that has nothing left and does not say when it will have.
_UNKNOWN_WAIT_S: Final = 1.0
_BYTES_A_TOKEN: Final = 4
# Of an answer whose request does not say how long it may be.
_USUAL_ANSWER_TOKENS: Final = 256


class Ceiling:
    """The ceilings of one deployment in one gateway: concurrency, requests and tokens a minute.

    With several gateways each takes its share, `ceiling / gateways`, at least 1. So together they exceed a ceiling that
    is smaller than their number, and a busy one cannot use what others leave.

    Within no 60 s are more requests begun, or more tokens expected, than the ceiling says. What the provider says
    itself holds too: `limits`, filled in by its engine, and `refuse`. Ask `wait_s`, then `enter`, in the same turn of
    the loop; then `leave`, once. None of that is needed while `is_active` is False.
    """

    __slots__ = ("_clock", "_concurrency", "_gateways", "_is_set", "_limits", "_requests", "_tokens", "_used")

    def __init__(
        self, settings: RoutedDeployment, clock: Clock, *, gateways: int = 1, limits: ProviderLimits | None = None
    ) -> None:
        self._clock = clock
        self._gateways = gateways
        self._limits = limits
        self._concurrency = _share(settings.max_concurrency, gateways)
        self._requests = _share(settings.requests_per_minute, gateways)
        self._tokens = _share(settings.tokens_per_minute, gateways)
        self._used = _Used()
        self._is_set = any(ceiling is not None for ceiling in (self._concurrency, self._requests, self._tokens))

    @property
    def is_active(self) -> bool:
        """Whether there is any ceiling: one of ours, or one that the provider has told of."""
        limits = self._limits
        return self._is_set or self._used.refused_until > 0 or (limits is not None and limits.are_known)

    @property
    def counts_tokens(self) -> bool:
        """Whether it matters how many tokens a call brings: else 0 will do (see `expected_tokens`)."""
        limits = self._limits
        return self._tokens is not None or (limits is not None and limits.tokens_left != math.inf)

    def changed(self, settings: RoutedDeployment) -> "Ceiling":
        """One with other ceilings, for the same provider: what this one has let in counts there, and the other way."""
        other = Ceiling(settings, self._clock, gateways=self._gateways, limits=self._limits)
        other._used = self._used
        return other

    def wait_s(self, tokens: int) -> float:
        """Seconds until a call of so many tokens, prompt and answer, may enter; 0.0: now."""
        now = self._clock.monotonic()
        used = self._used
        wait = 0.0
        if used.refused_until > now:
            wait = used.refused_until - now
        if self._concurrency is not None and used.in_flight >= self._concurrency:
            wait = max(wait, _PLACE_WAIT_S)
        if self._requests is not None:
            wait = max(wait, used.requests.wait_s(now, 1, self._requests))
        if self._tokens is not None:
            wait = max(wait, used.tokens.wait_s(now, tokens, self._tokens))
        if (limits := self._limits) is not None:
            left = limits.requests_left + (now - limits.requests_at) * limits.requests_a_second
            if left < 1:
                wait = max(wait, _refill_s(1 - left, limits.requests_a_second))
            left = limits.tokens_left + (now - limits.tokens_at) * limits.tokens_a_second
            if left < tokens:
                wait = max(wait, _refill_s(tokens - left, limits.tokens_a_second))
        return wait

    def enter(self, tokens: int) -> int:
        """Takes what it needs, whatever `wait_s` says. What it gives is for `leave`."""
        used = self._used
        used.in_flight += 1
        second = 0
        if self._requests is not None or self._tokens is not None:
            second = int(self._clock.monotonic())
            used.requests.add(second, 1)
            used.tokens.add(second, tokens)
        if (limits := self._limits) is not None:
            # Until the provider says more.
            limits.requests_left -= 1
            limits.tokens_left -= tokens
        return second

    def leave(self, entry: int, tokens: int, used: int | None = None) -> None:
        """The call that entered with `tokens` has ended, having used so many; None: nobody knows."""
        count = self._used
        count.in_flight -= 1
        if self._tokens is not None and used is not None and used != tokens:
            second = int(self._clock.monotonic())
            if used > tokens:
                count.tokens.add(second, used - tokens)
            else:
                count.tokens.take_back(second, entry, tokens - used)

    def refuse(self, retry_after_s: float) -> None:
        """The provider refused a call as one too many (429): none is sent until that time is over."""
        self._used.refused_until = max(self._used.refused_until, self._clock.monotonic() + retry_after_s)


class _Used:
    """What calls have taken of a deployment, whatever its ceilings are."""

    __slots__ = ("in_flight", "refused_until", "requests", "tokens")

    def __init__(self) -> None:
        self.in_flight = 0
        self.refused_until = 0.0
        self.requests = _Window()
        self.tokens = _Window()


def expected_tokens(call: Call) -> int:
    """Tokens that a call will use, prompt and answer, much as providers estimate it: by what it says of its length."""
    prompt = call.body_bytes // _BYTES_A_TOKEN
    params = call.params
    if isinstance(params, ChatParams):
        prompt = (call.body_bytes - params.media.inlined_bytes) // _BYTES_A_TOKEN
    elif not isinstance(params, CompletionParams):
        return prompt
    limit = params.answer_limit
    return prompt + (_USUAL_ANSWER_TOKENS if limit is None else limit)


class _Window:
    """What was added in the last `WINDOW_S` seconds, by whole ones: that in which the window begins counts in full."""

    __slots__ = ("_added", "_second", "_sum")

    def __init__(self) -> None:
        self._added = [0] * (WINDOW_S + 1)
        self._sum = 0
        self._second = 0

    def wait_s(self, now: float, cost: int, ceiling: int) -> float:
        """Seconds until so much can be added; what is more than the ceiling fits when nothing else is there."""
        second = int(now)
        if second != self._second:
            self._turn_to(second)
        excess = self._sum + min(cost, ceiling) - ceiling
        if excess <= 0:
            return 0.0
        size = len(self._added)
        for oldest in range(second - WINDOW_S, second + 1):
            excess -= self._added[oldest % size]
            if excess <= 0:
                return oldest + size - now
        raise AssertionError("the sum is that of its parts")

    def add(self, second: int, amount: int) -> None:
        if second != self._second:
            self._turn_to(second)
        self._added[second % len(self._added)] += amount
        self._sum += amount

    def take_back(self, second: int, entry: int, amount: int) -> None:
        """Of what was added in the second `entry`, should that still count."""
        if second != self._second:
            self._turn_to(second)
        if entry >= second - WINDOW_S:
            self._added[entry % len(self._added)] -= amount
            self._sum -= amount

    def _turn_to(self, second: int) -> None:
        """Forgets the seconds that have left the window."""
        size = len(self._added)
        for gone in range(self._second + 1, min(second, self._second + size) + 1):
            self._sum -= self._added[gone % size]
            self._added[gone % size] = 0
        self._second = second


def _share(ceiling: int | None, gateways: int) -> int | None:
    return None if ceiling is None else max(1, ceiling // gateways)


def _refill_s(missing: float, a_second: float) -> float:
    return missing / a_second if a_second > 0 else _UNKNOWN_WAIT_S
