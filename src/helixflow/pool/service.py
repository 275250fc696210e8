"""PoolService of proto/helixflow/pool/v1 over the supervisor, and what the control process starts."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.engines.llama_cpp.probe import LlamaCppKind
from helixflow.pki.names import replica_server_name
from helixflow.pool.catalogue import Catalogue
from helixflow.pool.generate import Generator
from helixflow.pool.launcher_client import Engines
from helixflow.pool.lifecycle import DeploymentView, ServingReplica
from helixflow.pool.plan import plan_deployments, pool_name
from helixflow.pool.store import ModelStore
from helixflow.pool.supervisor import Supervisor
from helixflow.pool.tokenizers import read_tokenizer
from helixflow.rpc.generated.pool_v1 import pool_pb2, pool_pb2_grpc
from helixflow.settings.tree import Settings
from helixflow.transport.client import HttpClient

_Context = grpc.aio.ServicerContext[Any, Any]
SERVICE_NAME = pool_pb2.DESCRIPTOR.services_by_name["PoolService"].full_name


class PoolService(pool_pb2_grpc.PoolServiceServicer):
    """The gRPC face of `Supervisor`. Errors are `HelixError`s; the server's interceptor renders them."""

    def __init__(self, supervisor: Supervisor, *, name: str, trust_domain: str) -> None:
        """`name` is the pool's in the fleet."""
        self._supervisor = supervisor
        self._name = name
        self._trust_domain = trust_domain
        self.generator: Generator | None = None

    async def ListModels(self, request: pool_pb2.ListModelsRequest, context: _Context) -> pool_pb2.ListModelsResponse:
        return pool_pb2.ListModelsResponse(deployments=self._snapshot())

    async def LoadModel(self, request: pool_pb2.LoadModelRequest, context: _Context) -> pool_pb2.LoadModelResponse:
        self._supervisor.load(request.deployment)
        return pool_pb2.LoadModelResponse()

    async def WatchReplicas(
        self, request: pool_pb2.WatchReplicasRequest, context: _Context
    ) -> AsyncIterator[pool_pb2.WatchReplicasResponse]:
        changes = self._supervisor.changes
        while True:
            seen = changes.revision
            yield pool_pb2.WatchReplicasResponse(deployments=self._snapshot(), pool=self._name)
            if changes.is_closed:
                return
            await changes.wait_beyond(seen)

    async def Generate(
        self, request: pool_pb2.GenerateRequest, context: _Context
    ) -> AsyncIterator[pool_pb2.GenerateResponse]:
        if self.generator is None:
            raise HelixError(ErrorKind.UNSUPPORTED, "This pool does not generate.")
        async with aclosing(self.generator.generate(request)) as pieces:
            async for piece in pieces:
                yield piece

    async def ReadTokenizer(
        self, request: pool_pb2.ReadTokenizerRequest, context: _Context
    ) -> AsyncIterator[pool_pb2.ReadTokenizerResponse]:
        async with aclosing(read_tokenizer(self._supervisor.snapshot(), request.sha256)) as pieces:
            async for piece in pieces:
                yield pool_pb2.ReadTokenizerResponse(data=piece)

    def _snapshot(self) -> list[pool_pb2.DeploymentStatus]:
        return [_to_status(view, self._trust_domain) for view in self._supervisor.snapshot()]


class PoolServices:
    """Everything the pool consists of in this process: `register`, then `run` until cancelled, then `close`."""

    def __init__(self, supervisor: Supervisor, client: HttpClient, *, name: str, trust_domain: str) -> None:
        self._supervisor = supervisor
        self._client = client
        self._service = PoolService(supervisor, name=name, trust_domain=trust_domain)

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the service to `server`, whose full name is `SERVICE_NAME`."""
        pool_pb2_grpc.add_PoolServiceServicer_to_server(self._service, server)

    def set_generator(self, generator: Generator) -> None:
        """What answers Generate; without it that is refused."""
        self._service.generator = generator

    async def run(self) -> None:
        """Supervises until cancelled. Raises `HelixError` (UNAVAILABLE) when the launcher is lost at the start."""
        await self._supervisor.run()

    async def close(self) -> None:
        """Ends all watches, which else never end. Engines go on. Idempotent."""
        self._supervisor.changes.close()
        await self._client.close()


def create_pool(settings: Settings, engines: Engines) -> PoolServices:
    """The pool for settings that are filled from the catalogue. Raises `UserError` (CONFIG)."""
    planned = plan_deployments(settings, Catalogue.load())
    client = HttpClient(max_connections=8)
    store = ModelStore(settings.models_dir)
    supervisor = Supervisor(planned, engines, {"llama_cpp": LlamaCppKind(client)}, store.pull)
    return PoolServices(supervisor, client, name=pool_name(settings), trust_domain=settings.pki.trust_domain)


def _to_status(view: DeploymentView, trust_domain: str) -> pool_pb2.DeploymentStatus:
    return pool_pb2.DeploymentStatus(
        deployment=view.deployment,
        state=pool_pb2.DeploymentState.ValueType(view.state.value),
        detail=view.detail,
        restarts=view.restarts,
        retry_after_s=view.retry_after_s,
        replicas=[_to_replica(serving, trust_domain) for serving in view.replicas],
    )


def _to_replica(serving: ServingReplica, trust_domain: str) -> pool_pb2.Replica:
    replica = serving.replica
    return pool_pb2.Replica(
        replica_id=replica.replica_id,
        host=replica.host,
        port=replica.port,
        api_key=replica.api_key,
        slots=replica.slots,
        context=replica.context,
        supports_tools=replica.supports_tools,
        vocabulary=replica.vocabulary,
        tokenizer_path=replica.tokenizer_path,
        pid=serving.pid,
        model_digest=replica.model_digest,
        tokenizer_sha256=serving.tokenizer_sha256,
        server_name=replica_server_name(trust_domain, replica.replica_id),
        gpus=serving.gpus,
    )
