"""What this node is to serve: models from the settings, completed from the catalogue."""

import difflib
import hashlib
import re
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec

from helixflow.core.errors import ExitCode, UserError
from helixflow.pool.catalogue import Catalogue, ModelSpec
from helixflow.settings.deployments import (
    Deployment,
    Launched,
    LaunchedDeployment,
    LlamaCppDeployment,
    RoutedDeployment,
)
from helixflow.settings.models import ModelSettings
from helixflow.settings.tree import Settings

# Of a launched deployment: what no engine process depends on.
_NOT_THE_ENGINES: Final = frozenset(RoutedDeployment.model_fields) | {
    *("source", "sha256", "nodes", "load", "keep_alive_s", "pinned", "replicas", "max_queue")
}
_NOT_IN_NAMES: Final = re.compile(r"[^a-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class PlannedDeployment:
    """One deployment that this node runs itself. `name` is `"<public name>/<name of the deployment>"`.

    `spec` is None where the engine finds its model itself: what its `model` says, a folder or a name.
    """

    name: str
    public_name: str
    settings: Launched
    spec: ModelSpec | None

    @property
    def fingerprint(self) -> str:
        """Equal for two plans whose engines are interchangeable: what the process is started with, and its model."""
        live = self.settings.live_settings
        parts = [self.public_name, self.settings.model_dump_json(exclude={*_NOT_THE_ENGINES, *live})]
        if live:
            parts.append(msgspec.json.encode(live).decode())
        if (spec := self.spec) is not None:
            file = (spec.source, spec.sha256, spec.task, spec.conversion)
            parts.append(msgspec.json.encode(file).decode())
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    @property
    def model_folder(self) -> Path | None:
        """The model of an engine that finds it itself, if it is a folder of this machine."""
        model = getattr(self.settings, "model", None)
        return Path(model).expanduser() if self.spec is None and model and Path(model).expanduser().is_dir() else None


def pool_name(settings: Settings) -> str:
    """The name of this node's pool in the fleet: as set, else made of the host's name."""
    name = settings.pool.name
    return (
        name if name is not None else _NOT_IN_NAMES.sub("-", socket.gethostname().lower()).strip("._-")[:63] or "node"
    )


def fill_from_catalogue(settings: Settings, catalogue: Catalogue) -> Settings:
    """The same settings with complete deployments, which every process of the node then sees.

    A model without deployments gets the catalogue's, where chat models load with the service and embedding models on
    first use, or those of a preset. Splits stay as they are.
    Raises `UserError` (CONFIG) for a name without deployments or source that the catalogue does not know.
    """
    models = tuple(_fill(model, catalogue) for model in settings.models)
    return settings.model_copy(update={"models": models})


def plan_deployments(settings: Settings, catalogue: Catalogue) -> tuple[PlannedDeployment, ...]:
    """The deployments that this node runs, of filled settings, in order: those that name no nodes, or this one.

    Raises `UserError` (CONFIG) as the catalogue does. Specifications of the same name are of the same file: where a
    public name has several, each has its deployment's.
    """
    node = pool_name(settings)
    planned: list[PlannedDeployment] = []
    for model in settings.models:
        planned += _plan_model(model, catalogue, node)
    return tuple(planned)


def _plan_model(model: ModelSettings, catalogue: Catalogue, node: str) -> list[PlannedDeployment]:
    planned = []
    for name, deployment in model.named_deployments():
        if not isinstance(deployment, LaunchedDeployment) or (deployment.nodes and node not in deployment.nodes):
            continue
        spec = None
        if isinstance(deployment, LlamaCppDeployment):
            spec = catalogue.spec_for(model.name, deployment.source, deployment.sha256, deployment.task)
            _check_tokenizer(name, deployment, spec)
        elif deployment.source is not None or deployment.sha256 is not None:
            raise UserError(
                f"{name}: {deployment.engine} takes its model from `model`, not from a source", ExitCode.CONFIG
            )
        planned.append(PlannedDeployment(name, model.name, deployment, spec))
    if len({(one.spec.source, one.spec.sha256) for one in planned if one.spec is not None}) > 1:
        # The store holds one file a name: under the public name they would drive each other out.
        return [replace(one, spec=replace(one.spec, name=one.name)) if one.spec is not None else one for one in planned]
    return planned


def _check_tokenizer(name: str, deployment: LlamaCppDeployment, spec: ModelSpec) -> None:
    """Text for embeddings is tokenised outside the engine: only the catalogue's models bring what that takes."""
    if deployment.tokenizer is not None:
        if not deployment.tokenizer.is_file():
            raise UserError(f"{name}: there is no file {deployment.tokenizer} (tokenizer)", ExitCode.CONFIG)
    elif spec.task == "embeddings" and spec.conversion is None:
        raise UserError(
            f"{name}: an embedding model outside the catalogue needs its tokenizer.json; name it with tokenizer = …",
            ExitCode.CONFIG,
        )


def _fill(model: ModelSettings, catalogue: Catalogue) -> ModelSettings:
    if model.split:
        return model
    if not model.deployments:
        # What is taken from a preset is complete: no need to know which.
        taken = {"deployments": (_default_deployment(model, catalogue),), "preset": None, "api_key_file": None}
        return model.model_copy(update=taken)
    filled = tuple(
        _with_source(model.name, deployment, catalogue) if isinstance(deployment, LlamaCppDeployment) else deployment
        for deployment in model.deployments
    )
    return model.model_copy(update={"deployments": filled})


def _default_deployment(model: ModelSettings, catalogue: Catalogue) -> Deployment:
    """As its preset says; without one as the catalogue says of its name, else as the preset of its name."""
    presets = catalogue.presets
    if model.preset is not None:
        return presets.deployment(presets.require(model.preset), model.api_key_file)
    if catalogue.find(model.name) is None and (preset := presets.find(model.name)) is not None:
        return presets.deployment(preset, model.api_key_file)
    if model.api_key_file is not None:
        raise UserError(
            f"the model {model.name!r} has an api_key_file, but no preset that would need it; give it a preset, or "
            "deployments",
            ExitCode.CONFIG,
        )
    spec = _known(model.name, catalogue)
    default = LlamaCppDeployment(engine="llama_cpp")
    return LlamaCppDeployment(
        engine="llama_cpp",
        source=spec.source,
        sha256=spec.sha256,
        task=spec.task,
        load="start" if spec.task == "chat" else "first_use",
        context=min(spec.context or default.context, default.context),
    )


def _with_source(name: str, deployment: LlamaCppDeployment, catalogue: Catalogue) -> LlamaCppDeployment:
    if deployment.source is not None:
        return deployment
    spec = _known(name, catalogue)
    update: dict[str, object] = {"source": spec.source, "task": spec.task}
    if "context" not in deployment.model_fields_set and spec.context:
        update["context"] = min(deployment.context, spec.context)
    return deployment.model_copy(update=update)


def _known(name: str, catalogue: Catalogue) -> ModelSpec:
    spec = catalogue.find(name)
    if spec is not None:
        return spec
    known = [*catalogue.names(), *(preset.name for preset in catalogue.presets.all())]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(close)}?"
        if close
        else f"known models: {', '.join(catalogue.names())}; `helixflow models presets` lists those of providers"
    )
    raise UserError(
        f"model {name!r} has no deployments (or no source) and is neither in the catalogue nor a preset; {hint}",
        ExitCode.CONFIG,
    )
