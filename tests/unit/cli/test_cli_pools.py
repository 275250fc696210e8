"""What `helixflow pools` shows of sizes."""

from typing import Any

import pytest

from helixflow.cli.output import format_size
from helixflow.cli.pools import _deployment_row, _pool_row

POOL: dict[str, Any] = {
    "name": "p",
    "address": None,
    "reachable": True,
    "draining": False,
    "ram_limit_bytes": 450_000_000,
    "ram_used_bytes": 0,
    "cores": 2,
    "devices": [],
    "deployments": [],
}
DEPLOYMENT: dict[str, Any] = {
    "deployment": "m/llama_cpp-0",
    "state": "idle",
    "detail": None,
    "pinned": False,
    "wanted_replicas": 1,
    "replicas": 0,
    "slots": 0,
    "busy": 0,
    "last_used_at": None,
}


def test_nothing_is_a_size_and_unknown_is_not() -> None:
    assert [format_size(size) for size in (0, 999, 1_500_000, None)] == ["0 B", "999 B", "1.5 MB", "-"]


def test_a_pool_without_models_takes_nothing_of_what_it_may() -> None:
    assert _pool_row(POOL)[3:] == ("2", "0 B of 450.0 MB", "0", "0")


def test_of_a_pool_that_does_not_answer_nothing_is_known() -> None:
    away = {**POOL, "reachable": False, "ram_limit_bytes": 0, "cores": 0}
    assert _pool_row(away)[2:] == ("does not answer", "-", "-", "-", "-")


@pytest.mark.parametrize(
    ("ram", "measured", "shown"),
    [(0, False, "-"), (340_000_000, False, "340.0 MB (planned)"), (340_000_000, True, "340.0 MB")],
)
def test_what_a_deployment_takes_is_measured_planned_or_unknown(ram: int, measured: bool, shown: str) -> None:
    row = _deployment_row({**DEPLOYMENT, "ram_bytes": ram, "gpu_bytes": 0, "measured": measured})
    assert row[4] == shown
