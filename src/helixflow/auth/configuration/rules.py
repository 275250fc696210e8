"""What a serving configuration must be, beyond well-formed. Given by who knows how models are served."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from helixflow.settings.configuration import Models
from helixflow.settings.models import ModelSettings
from helixflow.settings.problems import Problem

Given = Sequence[ModelSettings]


@dataclass(frozen=True, slots=True)
class Rules:
    """Both are called in a thread.

    `find_problems` says what keeps models from being served here, as a start would find it. `complete` fills in what a
    catalogue knows; raises `UserError` for what it does not.
    """

    find_problems: Callable[[Given], Sequence[Problem]]
    complete: Callable[[Given], Models]


# For who has models without a catalogue.
PLAIN = Rules(lambda _models: (), tuple)
