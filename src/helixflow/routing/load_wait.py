"""Waiting until a deployment has a replica at all, and asking for one."""

import asyncio
from collections.abc import Callable
from typing import Final

from helixflow.clients.pool import DeploymentView
from helixflow.core.errors import ErrorKind, HelixError

_RETRY_S: Final = 5.0
_FAILED_RETRY_S: Final = 30.0
_DRAINING_RETRY_S: Final = 30.0
_CHANGED_RETRY_S: Final = 1.0
# A node that restarts is back by then.
_GONE_GRACE_S: Final = 5.0
_GONE_RETRY_S: Final = 5.0


class LoadWait:
    """`update` it with what pools say; `request_load` is called when somebody finds the deployment idle or failed."""

    def __init__(self, deployment: str, load_wait_s: float, request_load: Callable[[str], None]) -> None:
        self._deployment = deployment
        self._load_wait_s = load_wait_s
        self._request_load = request_load
        self._view: DeploymentView | None = None
        # Since when no pool has it, on the event loop's clock; None while one has it, or nobody knows.
        self._gone_at: float | None = None
        self._changed = asyncio.Event()
        self._is_closed = False

    def update(self, view: DeploymentView) -> None:
        self._view = view
        if view.state != "gone":
            self._gone_at = None
        elif self._gone_at is None:
            self._gone_at = asyncio.get_running_loop().time()
        else:
            return  # that is no news
        self._wake()

    def close(self) -> None:
        """The deployment is not served any more: nobody waits for it."""
        self._is_closed = True
        self._wake()

    async def until_served(self, deadline: float) -> None:
        """Returns when a replica serves.

        Raises `HelixError`: UPSTREAM_UNAVAILABLE when it could not be loaded, LOADING when that takes too long or all
        pools that have it are being drained, NOT_SERVED when no pool has had it for a few seconds, OVERLOADED once it
        is closed.
        """
        loop = asyncio.get_running_loop()
        give_up = min(deadline, loop.time() + self._load_wait_s)
        asked = False
        while (view := self._view) is None or not view.replicas:
            if self._is_closed:
                raise removed()
            wanting = view is not None and view.state in ("idle", "failed")
            if wanting and not asked:
                self._request_load(self._deployment)
            # The pool that was loading it may be drained or gone: then another one is to be asked.
            asked = wanting
            if view is not None and view.state == "failed":
                raise HelixError(
                    ErrorKind.UPSTREAM_UNAVAILABLE,
                    "The model could not be loaded; its administrator finds the reason in the service's log.",
                    retry_after_s=view.retry_after_s or _FAILED_RETRY_S,
                )
            if view is not None and view.state == "draining":
                raise HelixError(
                    ErrorKind.LOADING,
                    "No server takes new requests for this model at the moment: all that have it are being drained.",
                    retry_after_s=_DRAINING_RETRY_S,
                )
            until = give_up
            if self._gone_at is not None:
                until = min(give_up, self._gone_at + _GONE_GRACE_S)
                if loop.time() >= until:
                    raise _not_served()
            changed = self._changed
            try:
                async with asyncio.timeout_at(until):
                    await changed.wait()
            except TimeoutError as exc:
                if self._gone_at is not None:
                    raise _not_served() from exc
                wait = view.retry_after_s if view is not None and view.retry_after_s else _RETRY_S
                raise HelixError(
                    ErrorKind.LOADING, "The model is still loading; try again shortly.", retry_after_s=wait
                ) from exc

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def _not_served() -> HelixError:
    return HelixError(
        ErrorKind.NOT_SERVED, "No node serves this model now; try again later.", retry_after_s=_GONE_RETRY_S
    )


def removed() -> HelixError:
    """For who waits for a deployment that the configuration does not have any more."""
    return HelixError(
        ErrorKind.OVERLOADED, "What serves the model has just been changed; try again.", retry_after_s=_CHANGED_RETRY_S
    )
