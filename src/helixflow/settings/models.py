"""Public models: their names, what serves them, and what happens when that fails."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Literal

from pydantic import Field, model_validator

from helixflow.settings.deployments import Deployment
from helixflow.settings.section import Amount, Label, Name, Section

# A split takes these from the model that a request goes to.
_OF_DEPLOYMENTS: Final = ("balance", "affinity", "hedge_after_s", "api_key_file")


class Split(Section):
    """One way of a split: requests for the model go to another one."""

    model: Name = Field(description="A model of this configuration.")
    weight: float = Field(gt=0, le=1_000_000, description="Its share.")


class ModelSettings(Section):
    """A public model name and what serves it. Without deployments and split: as the catalogue says."""

    name: Name = Field(description="The name that clients ask for.")
    aliases: tuple[Name, ...] = Field((), description="Further names for it.")
    preset: Name | None = Field(
        None, description="Without deployments: the preset that says what serves it; default: the one of its own name."
    )
    api_key_file: Path | None = Field(
        None, description="File that holds the key for the preset's provider; default: the provider's usual variable."
    )
    deployments: tuple[Deployment, ...] = Field((), description="What serves it; none: as catalogue or preset say.")
    split: tuple[Split, ...] = Field(
        (),
        description="Instead of deployments: other models by weight, the same one for the same user (canaries). "
        "`balance`, `affinity` and `hedge_after_s` are said there.",
    )
    fallbacks: tuple[Name, ...] = Field((), description="Models that are tried, in order, when all deployments fail.")
    fallback_on: tuple[Literal["error", "context_length", "content_filter"], ...] = Field(
        ("error",), description="What makes the fallbacks be tried."
    )
    residency: Label | None = Field(None, description="Only deployments of this region serve it, fallbacks too.")
    balance: Literal["load", "cost"] = Field(
        "load", description="Within a tier: the least loaded, or the cheapest that is healthy and free."
    )
    max_cost: Amount | None = Field(
        None, description="Dollars that one request may cost at most; dearer deployments do not serve it."
    )
    affinity: bool = Field(
        True,
        description="Requests that begin alike go to the same replica while its load stays within routing.load_guard.",
    )
    hedge_after_s: float | None = Field(
        None, gt=0, le=600, description="Without a first token after so long, a second deployment is asked as well."
    )

    @model_validator(mode="after")
    def _one_source(self) -> "ModelSettings":
        if self.split and (self.deployments or self.preset is not None):
            raise ValueError("give deployments (or a preset) or a split, not both")
        if self.split:
            self._check_split()
        if self.deployments and (self.preset is not None or self.api_key_file is not None):
            raise ValueError("preset and api_key_file are for models without deployments; a deployment has its own key")
        names = [self.local_name(index) for index in range(len(self.deployments))]
        if len(set(names)) < len(names):
            raise ValueError(f"the model {self.name!r} has two deployments of the same name")
        return self

    def _check_split(self) -> None:
        """What a model says of its own deployments says nothing where it has none; written defaults do no harm."""
        fields = type(self).model_fields
        idle = [name for name in _OF_DEPLOYMENTS if getattr(self, name) != fields[name].default]
        if idle:
            raise ValueError(
                f"{', '.join(idle)}: the split {self.name!r} has no deployments of its own; say it at those that it "
                "leads to"
            )

    def local_name(self, index: int) -> str:
        """The name of a deployment within the model."""
        deployment = self.deployments[index]
        return deployment.name or f"{deployment.engine}-{index}"

    def named_deployments(self) -> list[tuple[str, Deployment]]:
        """The deployments with their names in records, metrics and protocols, in order."""
        return [(f"{self.name}/{self.local_name(index)}", one) for index, one in enumerate(self.deployments)]


def fingerprint(section: Section) -> str:
    """Equal for equal sections, whatever process computes it."""
    return hashlib.sha256(section.model_dump_json().encode()).hexdigest()[:32]


def check_models(models: Iterable[ModelSettings]) -> None:
    """Raises `ValueError` for names taken twice, and for fallbacks and splits that lead nowhere or in circles."""
    by_name: dict[str, ModelSettings] = {}
    for model in models:
        for name in (model.name, *model.aliases):
            if name in by_name:
                raise ValueError(f"the model {name!r} is defined twice")
            by_name[name] = model
    for model in {id(one): one for one in by_name.values()}.values():
        for other in (*model.fallbacks, *(way.model for way in model.split)):
            if other not in by_name:
                raise ValueError(f"the model {model.name!r} refers to {other!r}, which is not defined")
        for way in model.split:
            if by_name[way.model].split:
                raise ValueError(f"the model {model.name!r} is split into {way.model!r}, which is split itself")
        if any(by_name[name] is model for name in model.fallbacks):
            raise ValueError(f"the model {model.name!r} falls back to itself")
