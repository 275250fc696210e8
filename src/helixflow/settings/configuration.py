"""The serving configuration: the part of the settings that changes while everything runs, as a document of its own.

A document is what was given, without defaults, as JSON with sorted keys: equal for configurations that say the same,
and readable for later versions, which know more settings.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import ValidationError, field_validator

from helixflow.settings.masking import HIDDEN
from helixflow.settings.models import ModelSettings, check_models
from helixflow.settings.problems import Location, Problem, problems_of
from helixflow.settings.section import Section

Models = tuple[ModelSettings, ...]


class ServingConfiguration(Section):
    """What models are served, and by what."""

    models: Models

    @field_validator("models")
    @classmethod
    def _consistent(cls, models: Models) -> Models:
        check_models(models)
        return models


class Refused(Exception):
    """A configuration that cannot be in force; nothing has changed."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(map(str, problems)))
        self.problems = tuple(problems)


def document_of(models: Iterable[ModelSettings]) -> str:
    """The document of these models. Not of those that the catalogue has filled: give those that were read."""
    return _render([model.model_dump(mode="json", exclude_unset=True) for model in models])


def complete_document_of(models: Iterable[ModelSettings]) -> str:
    """The same with all defaults, for who must not have others."""
    return _render([model.model_dump(mode="json") for model in models])


def parse_document(document: str | bytes) -> dict[str, Any]:
    """The tree of a document, whatever is in it. Raises `Refused` for what is no JSON object."""
    try:
        tree = json.loads(document)
    except (ValueError, RecursionError) as exc:
        raise Refused([Problem((), f"not valid JSON: {exc}")]) from exc
    if not isinstance(tree, dict):
        raise Refused([Problem((), 'a configuration is an object: {"models": […]}')])
    return tree


def read_models(tree: dict[str, Any]) -> Models:
    """The models of a document's tree. Raises `Refused` with all that is wrong."""
    try:
        models = ServingConfiguration.model_validate_json(json.dumps(tree)).models
    except ValidationError as exc:
        raise Refused(problems_of(exc)) from exc
    if hidden := list(_still_hidden(models)):
        raise Refused(hidden)
    return models


def read_document(document: str | bytes) -> Models:
    """`parse_document` and `read_models`."""
    return read_models(parse_document(document))


def _render(models: list[dict[str, Any]]) -> str:
    return json.dumps({"models": models}, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _still_hidden(models: Models) -> Iterable[Problem]:
    """What was shown hidden and is not known: a configuration must say it."""
    for index, model in enumerate(models):
        for number, deployment in enumerate(model.deployments):
            place: Location = ("models", index, "deployments", number)
            for name, value in getattr(deployment, "headers", {}).items():
                if HIDDEN in value:
                    yield Problem((*place, "headers", name), "its value is hidden and not known here: give it")
            if HIDDEN in getattr(deployment, "base_url", ""):
                yield Problem((*place, "base_url"), "a part of it is hidden and not known here: give it")
