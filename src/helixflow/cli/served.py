"""The models of a configuration, seen from outside: what each name is for."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from helixflow.settings.tree import Settings


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A public name. `warmth`: 0 loaded from the start, 1 loaded on first use, 2 at a provider (each call may cost)."""

    name: str
    task: Literal["chat", "embeddings"]
    warmth: int


def served_models(settings: "Settings") -> list[ServedModel]:
    """All configured models, in order. Raises `UserError` (CONFIG) for one that the catalogue does not know."""
    from helixflow.pool.catalogue import Catalogue
    from helixflow.pool.plan import fill_from_catalogue
    from helixflow.settings.deployments import LlamaCppDeployment, VllmDeployment

    served = []
    models = fill_from_catalogue(settings, Catalogue.load()).models
    by_name = {model.name: model for model in models}
    for model in models:
        # A split is for what its ways are for, and they are not split themselves.
        served_by = by_name[model.split[0].model] if model.split else model
        first = served_by.deployments[0]
        if isinstance(first, LlamaCppDeployment | VllmDeployment):
            served.append(ServedModel(model.name, first.task, 0 if first.load == "start" else 1))
        else:
            served.append(ServedModel(model.name, "embeddings" if looks_like_embeddings(model.name) else "chat", 2))
    return served


def looks_like_embeddings(name: str) -> bool:
    """A guess, for names that only a provider knows."""
    return "embed" in name.lower() or "rerank" in name.lower()
