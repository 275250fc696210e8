"""What is wrong with given settings: where, and why, in words of ours."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from helixflow.settings.section import SHAPES

Location = tuple[str | int, ...]

# Where TOML has two brackets, and above what, is easily mistaken.
_A_LIST: Final[dict[Location, str]] = {
    ("models",): "must be a list: each model begins with [[models]] and its name, before its [[models.deployments]]",
    ("deployments",): "must be a list: each deployment begins with [[models.deployments]]",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why settings are refused. It names no secret."""

    location: Location
    reason: str

    @property
    def path(self) -> str:
        """`models[1].deployments[0].weight`."""
        return dotted(self.location)

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" if self.location else self.reason


def problems_of(error: ValidationError, beneath: Location = ()) -> list[Problem]:
    """All that a validation found; `beneath` is where in the settings the validated part stands."""
    return [_explain(found, beneath) for found in error.errors(include_input=False, include_url=False)]


def dotted(location: Iterable[str | int]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _explain(error: ErrorDetails, beneath: Location) -> Problem:
    location = _without_tags((*beneath, *error["loc"]))
    reason = error["msg"].removeprefix("Value error, ")
    match error["type"]:
        case "extra_forbidden":
            reason = "unknown key; see docs/reference/settings.md for the known ones"
        case "union_tag_not_found":
            reason = 'a deployment needs an engine, such as engine = "llama_cpp" or engine = "openai"'
        case "union_tag_invalid":
            location = (*location, "engine")
            reason = f"unknown engine {error['ctx']['tag']!r}; use one of {error['ctx']['expected_tags']}"
        case "tuple_type":
            reason = _A_LIST.get(location[-1:], "must be a list")
        case "string_pattern_mismatch":
            reason = SHAPES.get(error["ctx"]["pattern"], reason)
    return Problem(location, reason)


def _without_tags(location: Location) -> Location:
    """The engine kind, which pydantic puts after a deployment's number, is no key of it."""
    numbered = [
        index + 2
        for index, part in enumerate(location[:-1])
        if part == "deployments" and isinstance(location[index + 1], int)
    ]
    return tuple(part for index, part in enumerate(location) if index not in numbered)
