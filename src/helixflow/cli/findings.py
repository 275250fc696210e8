"""What a check of `helixflow doctor` found."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Finding:
    """`advice` says what to do about a warning or a problem; empty where there is nothing to do."""

    name: str
    status: Literal["ok", "warning", "problem"]
    message: str
    advice: str = ""
