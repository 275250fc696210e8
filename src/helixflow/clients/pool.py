"""A gateway's view of one pool: which deployments it has, and where their replicas listen."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import grpc
import structlog

from helixflow.clients.tokenizers import TokenizerCache
from helixflow.clients.watching import Watch
from helixflow.core.capacity import Replica
from helixflow.core.errors import HelixError
from helixflow.rpc.errors import from_rpc_error
from helixflow.rpc.generated.pool_v1 import pool_pb2, pool_pb2_grpc

LOAD_TIMEOUT_S: Final = 5.0
_STATE_PREFIX: Final = "DEPLOYMENT_STATE_"
_FETCH_AGAIN_S: Final = 5.0

log = structlog.get_logger("helixflow.clients")


@dataclass(frozen=True, slots=True)
class DeploymentView:
    """One deployment as the pool last told. `state` is `idle`, `pulling`, `loading`, `ready`, `backoff`, `failed` or
    `unloading`, `draining` while the pool neither serves nor loads anything new, and `unspecified` for one that only a
    newer pool knows; `gone` once no pool has it. `retry_after_s` is 0 when unknown. One that is `ready` has replicas.
    """

    deployment: str
    state: str
    detail: str
    restarts: int
    retry_after_s: float
    replicas: tuple[Replica, ...]


@dataclass(frozen=True, slots=True)
class RemotePool:
    """How a gateway reaches the replicas of a pool on another node: the pool's name, its data port, and where the
    tokenizers of its models are kept.
    """

    name: str
    data_host: str
    data_port: int
    tokenizers: TokenizerCache


class PoolWatch:
    """Follows a pool. `views`, by deployment, is replaced with every change, and kept while the pool is away. `heard`
    once the pool has said anything.

    Without `remote` it is the pool of this node. Of another one, replicas of embedding models are shown once their
    tokenizer is here; until then it is still loading. While a pool drains it shows none.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        on_change: Callable[[dict[str, DeploymentView]], None],
        *,
        remote: RemotePool | None = None,
    ) -> None:
        self._stub = pool_pb2_grpc.PoolServiceStub(channel)
        self._on_change = on_change
        self._remote = remote
        self._snapshot: pool_pb2.WatchReplicasResponse | None = None
        self._fetching: dict[str, asyncio.Task[None]] = {}
        self.views: dict[str, DeploymentView] = {}
        self.connected = False
        self.heard = False

    async def run(self) -> None:
        """Watches until cancelled. `on_change` is called on the event loop, after `views` has changed."""
        try:
            await Watch("replicas", self._open_watch, self._on_snapshot, self._on_watch_lost).run()
        finally:
            for task in self._fetching.values():
                task.cancel()
            await asyncio.gather(*self._fetching.values(), return_exceptions=True)

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
        self._snapshot = snapshot
        # Also when it has nothing: then it is known that it has nothing.
        is_news, self.heard = not self.heard, True
        self._show(is_news=is_news)

    def _on_watch_lost(self) -> None:
        self.connected = False

    def _show(self, *, is_news: bool = False) -> None:
        snapshot = self._snapshot
        assert snapshot is not None
        if self._remote is not None:
            self._fetch_tokenizers(snapshot, self._remote.tokenizers)
        views = {
            status.deployment: view_of(status, self._remote, draining=snapshot.draining)
            for status in snapshot.deployments
        }
        if is_news or views != self.views:
            self.views = views
            self._on_change(views)

    def _fetch_tokenizers(self, snapshot: pool_pb2.WatchReplicasResponse, cache: TokenizerCache) -> None:
        wanted = {one.tokenizer_sha256 for status in snapshot.deployments for one in status.replicas} - {""}
        for sha256 in wanted - self._fetching.keys():
            if cache.path_of(sha256) is None:
                self._fetching[sha256] = asyncio.create_task(self._fetch(cache, sha256), name="tokenizer")

    async def _fetch(self, cache: TokenizerCache, sha256: str) -> None:
        try:
            await cache.fetch(self._stub, sha256)
        except HelixError as exc:
            log.warning("tokenizer.not_fetched", sha256=sha256, code=exc.code, reason=exc.message)
            await asyncio.sleep(_FETCH_AGAIN_S)
        del self._fetching[sha256]
        self._show()


def view_of(
    status: pool_pb2.DeploymentStatus, remote: RemotePool | None = None, *, draining: bool = False
) -> DeploymentView:
    """The view of one deployment from its message."""
    replicas = () if draining else tuple(_replicas_of(status, remote))
    known = pool_pb2.DeploymentState.values()
    number = status.state if status.state in known else pool_pb2.DEPLOYMENT_STATE_UNSPECIFIED
    state = pool_pb2.DeploymentState.Name(number).removeprefix(_STATE_PREFIX).lower()
    if draining:
        # Whatever it has, others do not get: a pool that can load it is better.
        state = "draining"
    elif state == "ready" and not replicas:
        state = "loading"
    return DeploymentView(
        deployment=status.deployment,
        state=state,
        detail=status.detail,
        restarts=status.restarts,
        retry_after_s=status.retry_after_s,
        replicas=replicas,
    )


def _replicas_of(status: pool_pb2.DeploymentStatus, remote: RemotePool | None) -> Iterator[Replica]:
    for replica in status.replicas:
        host, port, server_name, path = replica.host, replica.port, "", replica.tokenizer_path
        if remote is not None:
            if not replica.server_name:
                continue  # it cannot be reached from here
            host, port, server_name, path = remote.data_host, remote.data_port, replica.server_name, ""
            if replica.tokenizer_sha256:
                fetched = remote.tokenizers.path_of(replica.tokenizer_sha256)
                if fetched is None:
                    continue
                path = fetched
        yield Replica(
            replica_id=replica.replica_id,
            host=host,
            port=port,
            api_key=replica.api_key,
            slots=replica.slots,
            context=replica.context,
            supports_tools=replica.supports_tools,
            vocabulary=replica.vocabulary,
            tokenizer_path=path,
            model_digest=replica.model_digest,
            server_name=server_name,
            adapters=tuple(replica.adapters),
            pool=remote.name if remote is not None else "",
        )
