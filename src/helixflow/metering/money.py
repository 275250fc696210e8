"""Money: whole nanodollars (1e-9 US dollars), as `int`. Never floats.

Text is a plain decimal number of dollars with at most nine decimals.
"""

import re
from typing import Final

NANOS: Final = 1_000_000_000
# Numbers up to 2^53 are exact in Redis' scripts too.
MAX_NANODOLLARS: Final = 9_000_000 * NANOS

_AMOUNT: Final = re.compile(r"(\d{1,10})(?:\.(\d{1,9}))?")


def parse_dollars(text: str) -> int:
    """Nanodollars. Raises `ValueError` that says what is expected: no sign, no exponent, at most nine decimals."""
    match = _AMOUNT.fullmatch(text)
    if match is None or not text.isascii():
        raise ValueError("an amount is a number of US dollars such as 12.50, with at most nine decimals")
    nanodollars = int(match[1]) * NANOS + int((match[2] or "").ljust(9, "0"))
    if nanodollars > MAX_NANODOLLARS:
        raise ValueError(f"an amount is at most {MAX_NANODOLLARS // NANOS} US dollars")
    return nanodollars


def format_dollars(nanodollars: int) -> str:
    """The shortest text with at least two decimals; negative amounts (differences) with a minus."""
    sign = "-" if nanodollars < 0 else ""
    whole, rest = divmod(abs(nanodollars), NANOS)
    decimals = f"{rest:09d}".rstrip("0").ljust(2, "0")
    return f"{sign}{whole}.{decimals}"
