"""Settings as they are shown: what may be a credential in plain text is hidden, and found again when it comes back.

Keys are named by file or variable and so never in the settings; values of headers, and what stands before the `@` of an
address, may be anything.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from helixflow.settings.deployments import ProviderDeployment
from helixflow.settings.models import ModelSettings

# In values of headers.
VARIABLE: Final = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
HIDDEN: Final = "…hidden…"


def hide_secrets(tree: dict[str, Any]) -> dict[str, Any]:
    """Hides them in `tree`, a dump of settings or of a serving configuration, and returns it."""
    for model in tree.get("models", ()):
        for deployment in model.get("deployments", ()):
            if "headers" in deployment:
                deployment["headers"] = {name: hide_value(value) for name, value in deployment["headers"].items()}
            if "@" in deployment.get("base_url", ""):
                deployment["base_url"] = _hide_user(deployment["base_url"])
    return tree


def hide_value(value: str) -> str:
    """A header's value: `${ENV}` says nothing, anything else may."""
    return value if VARIABLE.fullmatch(value) else HIDDEN


def secret_variables(models: Iterable[ModelSettings]) -> frozenset[str]:
    """The environment variables in which deployments have their keys, or parts of headers."""
    names: set[str] = set()
    for model in models:
        for deployment in model.deployments:
            if isinstance(deployment, ProviderDeployment):
                names.update([deployment.api_key_env] if deployment.api_key_env else ())
                names.update(*map(VARIABLE.findall, deployment.headers.values()))
    return frozenset(names)


def restore_secrets(tree: dict[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Puts back what `hide_secrets` has hidden, from `known`, the same before it was hidden: by the names of model and
    deployment. What is not found there stays hidden, which no validation lets through.
    """
    before = dict(_deployments(known))
    for name, deployment in _deployments(tree):
        same = before.get(name, {})
        if isinstance(headers := deployment.get("headers"), dict):
            had = same.get("headers", {})
            deployment["headers"] = {
                header: had.get(header, HIDDEN) if value == HIDDEN else value for header, value in headers.items()
            }
        if isinstance(url := deployment.get("base_url"), str) and url == _hide_user(same.get("base_url", "")):
            deployment["base_url"] = same["base_url"]
    return tree


def _hide_user(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{HIDDEN}@{rest.rpartition('@')[2]}" if "@" in rest else url


def _deployments(tree: Mapping[str, Any]) -> list[tuple[tuple[str, str], dict[str, Any]]]:
    """By the names of model and deployment, which is its position where it has none. Takes what is no configuration."""
    found = []
    models = tree.get("models")
    for model in models if isinstance(models, list) else ():
        deployments = model.get("deployments") if isinstance(model, dict) else None
        for index, deployment in enumerate(deployments if isinstance(deployments, list) else ()):
            if isinstance(deployment, dict):
                found.append(((str(model.get("name")), str(deployment.get("name", index))), deployment))
    return found
