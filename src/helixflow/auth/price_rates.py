"""Rates of a price as administrators write and read them: dollars as text."""

from collections.abc import Sequence
from typing import Final

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.metering.money import format_dollars, parse_dollars
from helixflow.metering.prices import Price, Tier
from helixflow.rpc.generated.auth_v1 import usage_pb2 as pb

MAX_TIERS: Final = 16
# More than any prompt has; what is larger is a mistake.
MAX_FROM_TOKENS: Final = 1_000_000_000
SET: Final = "set"


def parse_rates(rates: pb.Rates) -> Price:
    """The price that an operator sets, sealed. Raises `HelixError` UNPROCESSABLE naming the field."""
    input_rate, cached, output = _parse_token_rates(rates, "rates")
    return Price(
        source=SET,
        input=input_rate,
        cached_input=cached,
        output=output,
        request=_parse(rates.request, "rates.request"),
        engine_second=_parse(rates.engine_second, "rates.engine_second"),
        tiers=_parse_tiers(rates.tiers),
    ).sealed()


def show_rates(price: Price) -> pb.Rates:
    """All amounts, also those that are zero: given back to `parse_rates` they make the same price."""
    return pb.Rates(
        input=format_dollars(price.input),
        cached_input=format_dollars(price.cached_input),
        output=format_dollars(price.output),
        request=format_dollars(price.request),
        engine_second=format_dollars(price.engine_second),
        tiers=[
            pb.RateTier(
                from_prompt_tokens=tier.from_prompt_tokens,
                input=format_dollars(tier.input),
                cached_input=format_dollars(tier.cached_input),
                output=format_dollars(tier.output),
            )
            for tier in price.tiers
        ],
    )


def _parse_tiers(tiers: Sequence[pb.RateTier]) -> tuple[Tier, ...]:
    if len(tiers) > MAX_TIERS:
        raise HelixError(ErrorKind.UNPROCESSABLE, f"A price has at most {MAX_TIERS} tiers.", param="rates.tiers")
    parsed: list[Tier] = []
    for index, tier in enumerate(tiers):
        field = f"rates.tiers[{index}]"
        least = parsed[-1].from_prompt_tokens + 1 if parsed else 1
        if not least <= tier.from_prompt_tokens <= MAX_FROM_TOKENS:
            message = f"A tier begins at {least} to {MAX_FROM_TOKENS} prompt tokens: tiers grow."
            raise HelixError(ErrorKind.UNPROCESSABLE, message, param=f"{field}.from_prompt_tokens")
        parsed.append(Tier(tier.from_prompt_tokens, *_parse_token_rates(tier, field)))
    return tuple(parsed)


def _parse_token_rates(rates: pb.Rates | pb.RateTier, field: str) -> tuple[int, int, int]:
    input_rate = _parse(rates.input, f"{field}.input")
    cached = _parse(rates.cached_input, f"{field}.cached_input") if rates.cached_input else input_rate
    return input_rate, cached, _parse(rates.output, f"{field}.output")


def _parse(text: str, field: str) -> int:
    if not text:
        return 0
    try:
        return parse_dollars(text)
    except ValueError as exc:
        message = str(exc)
        raise HelixError(ErrorKind.UNPROCESSABLE, f"{message[:1].upper()}{message[1:]}.", param=field) from exc
