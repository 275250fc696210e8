"""What keeps models from being served on this machine: names that nobody knows, files, variables, addresses.

Nothing is connected to and nothing is made. The same for the start, for `helixflow config check`, and for every change
while it runs.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

from helixflow.auth.configuration.rules import Rules
from helixflow.core.errors import UserError
from helixflow.engines.vllm.command import require_vllm
from helixflow.launch.provider_keys import check_keys, missing_key
from helixflow.pool.catalogue import Catalogue
from helixflow.pool.plan import PlannedDeployment, fill_from_catalogue, plan_deployments
from helixflow.pool.sources.source import parse_source
from helixflow.pool.store import check_file
from helixflow.settings.configuration import Models
from helixflow.settings.deployments import VllmDeployment
from helixflow.settings.models import ModelSettings
from helixflow.settings.problems import Problem
from helixflow.settings.tree import Settings
from helixflow.transport.origin import Origin

_FILES = ("chat_template_file", "mmproj", "draft_model", "ca_file", "api_key_file")


def serving_rules(settings: Settings, *, on_this_machine: bool = True) -> Rules:
    """With the catalogue of this version. Not `on_this_machine`: files and variables are those of other nodes."""
    catalogue = Catalogue.load()

    def find_problems(models: Sequence[ModelSettings]) -> Sequence[Problem]:
        return list(find_model_problems(settings, models, catalogue, on_this_machine=on_this_machine))

    return Rules(find_problems, lambda models: complete(models, catalogue))


def complete(models: Sequence[ModelSettings], catalogue: Catalogue) -> Models:
    """With what the catalogue says. Raises `UserError` (CONFIG)."""
    return fill_from_catalogue(Settings().model_copy(update={"models": tuple(models)}), catalogue).models


def find_model_problems(
    settings: Settings, models: Sequence[ModelSettings], catalogue: Catalogue, *, on_this_machine: bool = True
) -> Iterator[Problem]:
    """What a start with `settings`, but these models, would stumble over although they are well-formed; never a secret.

    Blocks, for vLLM while a Python starts.
    """
    for index, model in enumerate(models):
        try:
            filled = fill_from_catalogue(settings.model_copy(update={"models": (model,)}), catalogue)
            if on_this_machine:
                for planned in plan_deployments(filled, catalogue):
                    if isinstance(planned.settings, VllmDeployment):
                        require_vllm(planned.name, planned.settings)
                    if (reason := _missing_source(planned)) is not None:
                        yield Problem(("models", index, *_place_of(planned, model), "source"), reason)
                if not model.deployments:
                    # Of a preset.
                    check_keys(filled.models)
        except UserError as exc:
            yield Problem(("models", index), exc.message)
        for number, deployment in enumerate(model.deployments):
            for field, reason in _in_deployment(deployment, on_this_machine=on_this_machine):
                yield Problem(("models", index, "deployments", number, field), reason)


def _missing_source(planned: PlannedDeployment) -> str | None:
    """Why the file cannot be used that a deployment of this node has its model from. Its hash is left to the start."""
    if planned.spec is None or (source := parse_source(planned.spec.source)).kind != "file":
        return None
    try:
        check_file(source)
    except UserError as exc:
        return exc.message
    return None


def _place_of(planned: PlannedDeployment, model: ModelSettings) -> tuple[str | int, ...]:
    """Within the model; its own where it was filled in."""
    names = [name for name, _ in model.named_deployments()]
    return ("deployments", names.index(planned.name)) if planned.name in names else ()


def _in_deployment(deployment: Any, *, on_this_machine: bool) -> Iterator[tuple[str, str]]:
    """Setting and reason."""
    if (url := getattr(deployment, "base_url", None)) is not None:
        try:
            Origin.parse(url)
        except ValueError as exc:
            yield "base_url", str(exc)
    if not on_this_machine:
        return
    for field in _FILES:
        path = getattr(deployment, field, None)
        if path is not None and not (path.expanduser().is_file() and os.access(path.expanduser(), os.R_OK)):
            yield field, f"{path} is not a readable file"
    adapters = getattr(deployment, "lora", ())
    # By name where they are folders, which may be names on Hugging Face as well.
    for path in adapters if isinstance(adapters, tuple) else ():
        if not path.expanduser().is_file():
            yield "lora", f"{path} is not a readable file"
    binary = getattr(deployment, "binary", None)
    if binary is not None and shutil.which(binary.expanduser()) is None:
        yield "binary", f"{binary} is not an executable file"
    if (reason := missing_key(deployment)) is not None:
        field = "api_key_env" if deployment.api_key_file is None else "api_key_file"
        if field == "api_key_env" or "is empty" in reason:
            yield field, reason
    yield from _in_headers(getattr(deployment, "headers", {}))


def _in_headers(headers: dict[str, str]) -> Iterator[tuple[str, str]]:
    from helixflow.launch.gateway_engines import expand_headers

    try:
        expand_headers(headers)
    except ValueError as exc:
        yield "headers", str(exc)
