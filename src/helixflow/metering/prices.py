"""Prices, and what a call costs by them. Whole nanodollars throughout; rates are for a million tokens."""

import hashlib
from typing import Final

import msgspec
from msgspec import Struct

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.journal.records import Tokens

_MILLION: Final = 1_000_000
_VERSION_CHARS: Final = 16


class Tier(Struct, frozen=True, omit_defaults=True):
    """Rates for requests of at least so many prompt tokens; for all of their tokens."""

    from_prompt_tokens: int
    input: int
    cached_input: int
    output: int


class Price(Struct, frozen=True, omit_defaults=True):
    """What a deployment charges: nanodollars for a million tokens, for a request, for a second of the engine's time.

    `source` says where it is from: "set", "genai-prices <release>: <provider>/<model>", "default". `version` is a hash
    of all else and stands in ledger rows.
    """

    version: str = ""
    source: str = ""
    input: int = 0
    cached_input: int = 0
    output: int = 0
    request: int = 0
    engine_second: int = 0
    tiers: tuple[Tier, ...] = ()

    def sealed(self) -> "Price":
        """The same with its version."""
        body = _ENCODER.encode(msgspec.structs.replace(self, version=""))
        return msgspec.structs.replace(self, version=hashlib.sha256(body).hexdigest()[:_VERSION_CHARS])

    @property
    def is_free(self) -> bool:
        return not (self.input or self.cached_input or self.output or self.request or self.engine_second or self.tiers)

    def rate(self, tokens: Tokens, engine_ms: int) -> int:
        """What a call of so many tokens costs, rounded half up to a nanodollar. `engine_ms` below 0 counts as 0."""
        input_rate, cached_rate, output_rate = self._rates(tokens.prompt)
        cached = min(tokens.cached, tokens.prompt)
        millionths = (tokens.prompt - cached) * input_rate + cached * cached_rate + tokens.completion * output_rate
        # A second has a thousand milliseconds, and the sum is in millionths.
        millionths += max(engine_ms, 0) * self.engine_second * 1000
        return self.request + (millionths + _MILLION // 2) // _MILLION

    def bound(self, prompt_tokens: int, completion_tokens: int, engine_ms: int) -> int:
        """What a call of at most so many tokens and so much time costs at most."""
        dearest_input, dearest_output = max(self.input, self.cached_input), self.output
        for tier in self.tiers:
            dearest_input = max(dearest_input, tier.input, tier.cached_input)
            dearest_output = max(dearest_output, tier.output)
        millionths = prompt_tokens * dearest_input + completion_tokens * dearest_output
        millionths += engine_ms * self.engine_second * 1000
        return self.request + -(-millionths // _MILLION)

    def _rates(self, prompt_tokens: int) -> tuple[int, int, int]:
        rates = self.input, self.cached_input, self.output
        for tier in self.tiers:
            if prompt_tokens < tier.from_prompt_tokens:
                break
            rates = tier.input, tier.cached_input, tier.output
        return rates


class PricePeriod(Struct, frozen=True):
    """A price and when it holds: from `from_ms`, before `to_ms` (None: for ever)."""

    price: Price
    from_ms: int
    to_ms: int | None


_ENCODER: Final = msgspec.json.Encoder(order="deterministic")
_DECODER: Final = msgspec.json.Decoder(Price)


def encode_price(price: Price) -> bytes:
    return _ENCODER.encode(price)


def decode_price(body: bytes) -> Price:
    """Raises `HelixError` UPSTREAM_INVALID for what is no price."""
    try:
        return _DECODER.decode(body)
    except msgspec.DecodeError as exc:
        raise HelixError(ErrorKind.UPSTREAM_INVALID, "This is no price.") from exc
