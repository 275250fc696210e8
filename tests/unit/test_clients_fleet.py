from helixflow.clients.fleet import merge_views, rank_of
from helixflow.clients.pool import DeploymentView
from helixflow.core.capacity import Replica


def view(state: str, *replicas: str, restarts: int = 0, retry_after_s: float = 0) -> DeploymentView:
    shown = tuple(Replica(name, "127.0.0.1", 1, "k", 1, 64) for name in replicas)
    return DeploymentView("m/x", state, f"why {state}", restarts, retry_after_s, shown)


def test_the_best_pool_decides_and_all_replicas_are_there() -> None:
    merged = merge_views([view("failed", restarts=2), view("ready", "a"), view("loading", "b", restarts=1)])
    assert (merged.state, merged.detail, merged.restarts) == ("ready", "why ready", 3)
    assert [replica.replica_id for replica in merged.replicas] == ["a", "b"]


def test_one_that_can_be_loaded_is_better_than_one_that_waits_or_has_given_up() -> None:
    assert merge_views([view("backoff", retry_after_s=9), view("idle")]).state == "idle"
    assert merge_views([view("failed"), view("backoff", retry_after_s=9)]).retry_after_s == 9
    assert rank_of(view("idle")) < rank_of(view("failed")) < rank_of(view("of a newer pool"))


def test_a_pool_that_drains_hides_nobody_who_could_load_or_is_at_it() -> None:
    for state in ("idle", "loading", "backoff", "failed"):
        assert merge_views([view("draining"), view(state)]).state == state
    assert merge_views([view("draining"), view("draining")]).state == "draining"


def test_one_pool_alone_is_told_as_it_is() -> None:
    alone = view("pulling")
    assert merge_views([alone]) is alone
