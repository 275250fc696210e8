"""Keys for providers: whether they are where the settings say. They are read, and neither kept nor shown."""

from collections.abc import Iterable

from helixflow.core.errors import ExitCode, UserError
from helixflow.settings.deployments import Deployment, ProviderDeployment
from helixflow.settings.models import ModelSettings


def missing_key(deployment: Deployment) -> str | None:
    """Why the key cannot be read and what to do; None when it can, or none is wanted."""
    key = deployment.api_key if isinstance(deployment, ProviderDeployment) else None
    if key is None:
        return None
    try:
        key.read()
    except ValueError as exc:
        where = "put the key there, or name a file that holds it with api_key_file"
        return f"{exc}; {where}" if key.file is None else str(exc)
    return None


def check_keys(models: Iterable[ModelSettings]) -> None:
    """Raises `UserError` (CONFIG) for the first deployment whose key cannot be read."""
    for model in models:
        for name, deployment in model.named_deployments():
            if (reason := missing_key(deployment)) is not None:
                raise UserError(f"{name}: {reason}", ExitCode.CONFIG)
