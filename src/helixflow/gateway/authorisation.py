"""What a caller may do with models."""

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.permissions import Permission
from helixflow.core.principal import Principal, PrincipalKind


def require_inference(principal: Principal) -> None:
    """Raises `HelixError` PERMISSION_DENIED unless requests to models are permitted and belong to a project."""
    if not principal.project_id:
        raise _denied(
            "This access token is for no project, and requests to models belong to one. Choose a project when you sign "
            "in or refresh, or use an API key of a project."
        )
    if Permission.MODELS_USE not in principal.permissions:
        raise _lacks(principal, Permission.MODELS_USE)


def require_model(principal: Principal, model: str, asked: str) -> None:
    """Raises `HelixError` PERMISSION_DENIED for a model that the caller is not restricted to, neither by its own name
    nor by the one that was asked for.
    """
    if principal.models is not None and model not in principal.models and asked not in principal.models:
        raise _denied("This API key may not use this model. GET /v1/models lists those that it may use.", param="model")


def require_listing(principal: Principal) -> None:
    """Raises `HelixError` PERMISSION_DENIED unless the caller may see or use models."""
    if Permission.MODELS_USE not in principal.permissions and Permission.MODELS_READ not in principal.permissions:
        raise _lacks(principal, Permission.MODELS_READ)


def require(principal: Principal, permission: Permission) -> None:
    """Raises `HelixError` PERMISSION_DENIED."""
    if permission not in principal.permissions:
        raise _lacks(principal, permission)


def _lacks(principal: Principal, permission: Permission) -> HelixError:
    who = "This API key has" if principal.kind is PrincipalKind.KEY else "You have"
    return _denied(f"{who} not the permission {permission.value}, which this request needs.")


def _denied(message: str, param: str | None = None) -> HelixError:
    return HelixError(ErrorKind.PERMISSION_DENIED, message, param=param)
