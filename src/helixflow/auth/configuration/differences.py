"""What changes from one serving configuration to another. Without I/O."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from helixflow.settings.deployments import Deployment
from helixflow.settings.masking import hide_secrets, hide_value
from helixflow.settings.models import ModelSettings

Kind = Literal["added", "removed", "changed"]


@dataclass(frozen=True, slots=True)
class FieldDifference:
    """A setting as JSON, before and after; '' where it is not there. What may be secret is hidden."""

    name: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Difference:
    """Of a model, or of one of its deployments (named as in records). `fields` are empty unless it has changed."""

    model: str
    deployment: str
    kind: Kind
    fields: tuple[FieldDifference, ...] = ()


def find_differences(before: Iterable[ModelSettings], after: Iterable[ModelSettings]) -> list[Difference]:
    """Models in the order of `after`, those that are gone last; each before its deployments. Both are complete."""
    old = {model.name: model for model in before}
    new = {model.name: model for model in after}
    found: list[Difference] = []
    for name, model in new.items():
        if name not in old:
            found.append(Difference(name, "", "added"))
        elif fields := _compare(_own_fields(old[name]), _own_fields(model)):
            found.append(Difference(name, "", "changed", fields))
        found += _deployment_differences(name, old.get(name), model)
    for name, model in old.items():
        if name not in new:
            found.append(Difference(name, "", "removed"))
            found += _deployment_differences(name, model, None)
    return found


def names_of(models: Iterable[ModelSettings]) -> frozenset[str]:
    """All names that clients may ask for."""
    return frozenset(name for model in models for name in (model.name, *model.aliases))


def _deployment_differences(model: str, before: ModelSettings | None, after: ModelSettings | None) -> list[Difference]:
    old: dict[str, Deployment] = dict(before.named_deployments()) if before is not None else {}
    new: dict[str, Deployment] = dict(after.named_deployments()) if after is not None else {}
    found: list[Difference] = []
    for name, deployment in new.items():
        if name not in old:
            found.append(Difference(model, name, "added"))
        elif fields := _compare(_flat(old[name].model_dump(mode="json")), _flat(deployment.model_dump(mode="json"))):
            found.append(Difference(model, name, "changed", fields))
    return found + [Difference(model, name, "removed") for name in old if name not in new]


def _own_fields(model: ModelSettings) -> dict[str, Any]:
    return model.model_dump(mode="json", exclude={"name", "deployments"})


def _flat(deployment: dict[str, Any]) -> dict[str, Any]:
    """A header is a setting of its own: its name may be shown, its value may not."""
    headers = deployment.pop("headers", {})
    return {**deployment, **{f"headers.{name}": value for name, value in headers.items()}}


def _compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[FieldDifference, ...]:
    names: Sequence[str] = [*after, *(name for name in before if name not in after)]
    return tuple(
        FieldDifference(name, _show(name, before), _show(name, after))
        for name in names
        if name not in before or name not in after or before[name] != after[name]
    )


def _show(name: str, settings: Mapping[str, Any]) -> str:
    if name not in settings:
        return ""
    value = settings[name]
    if name.startswith("headers."):
        value = hide_value(value)
    elif name == "base_url" and "@" in value:
        value = hide_secrets({"models": [{"deployments": [{name: value}]}]})["models"][0]["deployments"][0][name]
    # A template may be long; that it changes is what matters.
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


_MAX_SHOWN = 500
