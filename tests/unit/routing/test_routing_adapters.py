"""Names of LoRA adapters, as `<model>:<adapter>`."""

from collections.abc import Mapping
from typing import Any

from helixflow.core.clock import FakeClock
from helixflow.routing.table import RoutingTable, build_table
from helixflow.routing.target import Target
from helixflow.settings.deployments import Deployment, VllmDeployment
from helixflow.settings.models import ModelSettings
from helixflow.settings.serving import RoutingSettings
from tests.harness.routing import ScriptedEngine, provider


def table_of(*models: ModelSettings) -> RoutingTable:
    targets: Mapping[str, Target] = {
        name: Target(name, ScriptedEngine(name), deployment, routing=RoutingSettings(), clock=FakeClock(), slots=None)
        for model in models
        for name, deployment in model.named_deployments()
    }
    return build_table(models, targets, created=0)


def vllm(**lora: str) -> VllmDeployment:
    return VllmDeployment(engine="vllm", name="-".join(lora) or None, model="m", lora=lora)


def model(name: str, *deployments: Deployment, **more: Any) -> ModelSettings:
    return ModelSettings(name=name, deployments=deployments, **more)


def test_an_adapter_is_a_name_of_its_model() -> None:
    routes = table_of(model("m", vllm(legal="/l", medical="/m"), aliases=("other",))).routes
    assert routes["m:legal"] is routes["m:medical"] is routes["m"]
    assert "other:legal" not in routes
    assert "m:nothing" not in routes


def test_only_what_all_of_its_deployments_have() -> None:
    both = table_of(model("m", vllm(legal="/l", medical="/m"), vllm(legal="/l")))
    assert set(both.routes) == {"m", "m:legal"}
    one = table_of(model("m", vllm(legal="/l"), provider("somebody")))
    assert set(one.routes) == {"m"}


def test_a_model_of_that_name_comes_first() -> None:
    routes = table_of(model("m", vllm(legal="/l")), model("m:legal", vllm())).routes
    assert routes["m:legal"].model == "m:legal"
