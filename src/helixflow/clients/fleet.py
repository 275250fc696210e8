"""What several pools say of the same deployment, as one view."""

from collections.abc import Iterable
from typing import Final

from helixflow.clients.pool import DeploymentView

# The best that any pool offers is what the deployment offers; one that is idle can still be loaded.
_BEST_FIRST: Final = (
    *("ready", "loading", "pulling", "idle", "unloading", "backoff", "failed"),
    *("draining", "unspecified"),
)
_RANKS: Final = {state: rank for rank, state in enumerate(_BEST_FIRST)}


def merge_views(views: Iterable[DeploymentView]) -> DeploymentView:
    """One view of a deployment, of at least one; the replicas of all, in the order of the views."""
    ordered = sorted(views, key=rank_of)
    leading = ordered[0]
    if len(ordered) == 1:
        return leading
    return DeploymentView(
        deployment=leading.deployment,
        state=leading.state,
        detail=leading.detail,
        restarts=sum(view.restarts for view in ordered),
        retry_after_s=leading.retry_after_s,
        replicas=tuple(replica for view in ordered for replica in view.replicas),
    )


def rank_of(view: DeploymentView) -> int:
    """The lower, the sooner this pool can serve the deployment."""
    return _RANKS.get(view.state, len(_BEST_FIRST))
