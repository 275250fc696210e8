from helixflow.clients.pool import DeploymentView, PoolWatch, view_of
from helixflow.core.capacity import Replica
from helixflow.rpc.generated.pool_v1 import pool_pb2


class NoChannel:
    def unary_unary(self, *_: object, **__: object) -> None: ...

    unary_stream = unary_unary


def _status(state: int = pool_pb2.DEPLOYMENT_STATE_READY) -> pool_pb2.DeploymentStatus:
    replica = pool_pb2.Replica(
        replica_id="r1",
        host="127.0.0.1",
        port=4000,
        api_key="k",
        slots=4,
        context=8192,
        supports_tools=True,
        pid=1,
        vocabulary=49152,
    )
    return pool_pb2.DeploymentStatus(deployment="m/llama_cpp-0", state=state, restarts=2, replicas=[replica])


def test_a_status_becomes_a_view_with_all_its_fields() -> None:
    replica = Replica("r1", "127.0.0.1", 4000, "k", 4, 8192, True, 49152, "")
    assert view_of(_status()) == DeploymentView("m/llama_cpp-0", "ready", "", 2, 0.0, (replica,))


def test_every_state_has_a_short_name_and_a_newer_pools_state_is_no_error() -> None:
    names = [view_of(_status(number)).state for number in (*pool_pb2.DeploymentState.values(), 99)]
    assert names == ["unspecified", "idle", "pulling", "loading", "ready", "backoff", "failed", "unspecified"]


def test_only_changes_are_told_and_the_last_views_stay_when_the_pool_goes() -> None:
    told: list[dict[str, DeploymentView]] = []
    watch = PoolWatch(NoChannel(), told.append)  # type: ignore[arg-type]
    snapshot = pool_pb2.WatchReplicasResponse(deployments=[_status()])
    watch._on_snapshot(snapshot, True)
    watch._on_snapshot(snapshot, False)
    watch._on_watch_lost()
    assert [list(views) for views in told] == [["m/llama_cpp-0"]]
    assert watch.views["m/llama_cpp-0"].state == "ready"
    assert not watch.connected
