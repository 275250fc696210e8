"""The gateway's view of the pool: which deployments there are, and where their replicas listen."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import grpc

from helixflow.clients.watching import Watch
from helixflow.core.capacity import Replica
from helixflow.rpc.errors import from_rpc_error
from helixflow.rpc.generated.pool_v1 import pool_pb2, pool_pb2_grpc

LOAD_TIMEOUT_S: Final = 5.0
_STATE_PREFIX: Final = "DEPLOYMENT_STATE_"


@dataclass(frozen=True, slots=True)
class DeploymentView:
    """One deployment as the pool last told. `state` is `idle`, `pulling`, `loading`, `ready`, `backoff` or `failed`,
    and `unspecified` for one that only a newer pool knows; `retry_after_s` is 0 when unknown.
    """

    deployment: str
    state: str
    detail: str
    restarts: int
    retry_after_s: float
    replicas: tuple[Replica, ...]


class PoolWatch:
    """Follows the pool. `views`, by deployment, is replaced with every change, and kept while the pool is away."""

    def __init__(self, channel: grpc.aio.Channel, on_change: Callable[[dict[str, DeploymentView]], None]) -> None:
        self._stub = pool_pb2_grpc.PoolServiceStub(channel)
        self._on_change = on_change
        self.views: dict[str, DeploymentView] = {}
        self.connected = False

    async def run(self) -> None:
        """Watches until cancelled. `on_change` is called on the event loop, after `views` has changed."""
        await Watch("replicas", self._open_watch, self._on_snapshot, self._on_watch_lost).run()

    async def load(self, deployment: str) -> None:
        """Asks the pool to load a deployment and does not wait for it. Raises `HelixError`."""
        request = pool_pb2.LoadModelRequest(deployment=deployment)
        try:
            await self._stub.LoadModel(request, timeout=LOAD_TIMEOUT_S)
        except grpc.RpcError as exc:
            raise from_rpc_error(exc) from exc

    def _open_watch(self, timeout_s: float) -> object:
        return self._stub.WatchReplicas(pool_pb2.WatchReplicasRequest(), timeout=timeout_s)

    def _on_snapshot(self, snapshot: pool_pb2.WatchReplicasResponse, _first: bool) -> None:
        self.connected = True
        views = {status.deployment: view_of(status) for status in snapshot.deployments}
        if views != self.views:
            self.views = views
            self._on_change(views)

    def _on_watch_lost(self) -> None:
        self.connected = False


def view_of(status: pool_pb2.DeploymentStatus) -> DeploymentView:
    """The view of one deployment from its message."""
    known = pool_pb2.DeploymentState.values()
    number = status.state if status.state in known else pool_pb2.DEPLOYMENT_STATE_UNSPECIFIED
    return DeploymentView(
        deployment=status.deployment,
        state=pool_pb2.DeploymentState.Name(number).removeprefix(_STATE_PREFIX).lower(),
        detail=status.detail,
        restarts=status.restarts,
        retry_after_s=status.retry_after_s,
        replicas=tuple(
            Replica(
                replica_id=replica.replica_id,
                host=replica.host,
                port=replica.port,
                api_key=replica.api_key,
                slots=replica.slots,
                context=replica.context,
                supports_tools=replica.supports_tools,
                vocabulary=replica.vocabulary,
                tokenizer_path=replica.tokenizer_path,
            )
            for replica in status.replicas
        ),
    )
