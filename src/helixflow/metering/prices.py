"""Prices, and what a call costs by them. Whole nanodollars throughout; rates are for a million tokens."""

import hashlib
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.journal.records import Tokens

_MILLION: Final = 1_000_000
_VERSION_CHARS: Final = 16

Rate = Annotated[int, Meta(ge=0)]


class Tier(Struct, frozen=True, omit_defaults=True):
    """Rates for requests of at least so many prompt tokens; for all of their tokens."""

    from_prompt_tokens: Rate
    input: Rate
    cached_input: Rate
    output: Rate


class Price(Struct, frozen=True, omit_defaults=True):
    """What a deployment charges: nanodollars for a million tokens, for a request, for a second of the engine's time.

    `source` says where it is from: "set", "genai-prices <release>: <provider>/<model>", "default". `version` is a hash
    of all else and stands in ledger rows. `tiers` grow by `from_prompt_tokens`. Rates are never negative.
    """

    version: str = ""
    source: str = ""
    input: Rate = 0
    cached_input: Rate = 0
    output: Rate = 0
    request: Rate = 0
    engine_second: Rate = 0
    tiers: tuple[Tier, ...] = ()

    def __post_init__(self) -> None:
        """Raises `ValueError` for tiers that do not grow: all of them would be taken for the last one."""
        for tier, following in zip(self.tiers, self.tiers[1:], strict=False):
            if tier.from_prompt_tokens >= following.from_prompt_tokens:
                raise ValueError("the tiers of a price grow by their prompt tokens")

    def sealed(self) -> "Price":
        """The same with its version."""
        body = _ENCODER.encode(msgspec.structs.replace(self, version=""))
        return msgspec.structs.replace(self, version=hashlib.sha256(body).hexdigest()[:_VERSION_CHARS])

    @property
    def is_free(self) -> bool:
        return not (self.input or self.cached_input or self.output or self.request or self.engine_second or self.tiers)

    def rate(self, tokens: Tokens, engine_ms: int) -> int:
        """What a call of so many tokens costs, rounded half up to a nanodollar. What is below 0 counts as 0, and no
        more tokens are cached than the prompt has.
        """
        prompt, cached, completion = tokens.prompt, tokens.cached, tokens.completion
        # Once for each request and second of a stream: `min` and `max` would double what it takes.
        if prompt < 0:
            prompt = 0
        if cached < 0:
            cached = 0
        elif cached > prompt:
            cached = prompt
        input_rate, cached_rate, output_rate = self.input, self.cached_input, self.output
        for tier in self.tiers:
            if prompt < tier.from_prompt_tokens:
                break
            input_rate, cached_rate, output_rate = tier.input, tier.cached_input, tier.output
        millionths = (prompt - cached) * input_rate + cached * cached_rate
        if completion > 0:
            millionths += completion * output_rate
        if engine_ms > 0:
            # A second has a thousand milliseconds, and the sum is in millionths.
            millionths += engine_ms * self.engine_second * 1000
        return self.request + (millionths + _MILLION // 2) // _MILLION

    def bound(self, prompt_tokens: int, completion_tokens: int, engine_ms: int) -> int:
        """What a call of at most so many tokens and so much time costs at most: never less than `rate` says of it."""
        prompt = prompt_tokens if prompt_tokens > 0 else 0
        dearest_input, dearest_output = self.input, self.output
        if self.cached_input > dearest_input:
            dearest_input = self.cached_input
        for tier in self.tiers:
            # A tier that is out of reach reserves nothing: of a budget that would be lost to others.
            if prompt < tier.from_prompt_tokens:
                break
            dearest_input = max(dearest_input, tier.input, tier.cached_input)
            dearest_output = max(dearest_output, tier.output)
        millionths = prompt * dearest_input
        if completion_tokens > 0:
            millionths += completion_tokens * dearest_output
        if engine_ms > 0:
            millionths += engine_ms * self.engine_second * 1000
        return self.request + -(-millionths // _MILLION)


class PricePeriod(Struct, frozen=True):
    """A price and when it holds: from `from_ms`, before `to_ms` (None: for ever). Milliseconds since the epoch."""

    price: Price
    from_ms: int
    to_ms: int | None


_ENCODER: Final = msgspec.json.Encoder(order="deterministic")
_DECODER: Final = msgspec.json.Decoder(Price)


def encode_price(price: Price) -> bytes:
    """JSON; what is 0 or empty is left out."""
    return _ENCODER.encode(price)


def decode_price(body: bytes) -> Price:
    """Raises `HelixError` UPSTREAM_INVALID for what is no price."""
    try:
        return _DECODER.decode(body)
    except msgspec.DecodeError as exc:
        raise HelixError(ErrorKind.UPSTREAM_INVALID, "This is no price.") from exc
