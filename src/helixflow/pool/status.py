"""What the pool knows as the messages of pool.proto."""

from helixflow.pki.names import replica_server_name
from helixflow.pool.lifecycle import DeploymentView, ServingReplica
from helixflow.pool.manifest import StoredModel
from helixflow.rpc.generated.pool_v1 import pool_pb2


def to_status(view: DeploymentView, trust_domain: str, *, show_replicas: bool = True) -> pool_pb2.DeploymentStatus:
    """`show_replicas`: false while no new generations may begin on them."""
    need = view.need
    return pool_pb2.DeploymentStatus(
        deployment=view.deployment,
        state=pool_pb2.DeploymentState.ValueType(view.state.value),
        detail=view.detail,
        restarts=view.restarts,
        retry_after_s=view.retry_after_s,
        replicas=[_to_replica(one, view, trust_domain) for one in view.replicas] if show_replicas else (),
        pinned=view.pinned,
        wanted_replicas=view.wanted_replicas,
        memory=pool_pb2.Memory(ram_bytes=need.ram_bytes, gpu_bytes=need.gpu_bytes, measured=need.measured)
        if need is not None
        else None,
        last_used_ms=int(view.last_used_at * 1000),
    )


def to_stored_model(model: StoredModel) -> pool_pb2.StoredModel:
    return pool_pb2.StoredModel(
        name=model.name,
        source=model.source,
        sha256=model.sha256,
        size_bytes=model.size_bytes,
        pulled_at_ms=int(model.pulled_at * 1000),
    )


def _to_replica(serving: ServingReplica, view: DeploymentView, trust_domain: str) -> pool_pb2.Replica:
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
        busy=view.busy.get(replica.replica_id, 0),
        tokenizer_sha256=serving.tokenizer_sha256,
        server_name=replica_server_name(trust_domain, replica.replica_id),
        gpus=serving.gpus,
        adapters=replica.adapters,
    )
