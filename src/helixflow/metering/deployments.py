"""Which deployments there are, as prices are asked for."""

from collections.abc import Iterable

from helixflow.rpc.generated.auth_v1 import metering_pb2
from helixflow.settings.tree import Deployment, ModelSettings, OpenAIDeployment


def deployment_refs(models: Iterable[ModelSettings]) -> list[metering_pb2.DeploymentRef]:
    """All deployments of these models, in order. The models are complete: what the catalogue fills in is there."""
    return [
        _ref(model.name, deployment, index) for model in models for index, deployment in enumerate(model.deployments)
    ]


def _ref(model: str, deployment: Deployment, index: int) -> metering_pb2.DeploymentRef:
    name = f"{model}/{deployment.engine}-{index}"
    ref = metering_pb2.DeploymentRef(deployment=name, model=model, engine=deployment.engine)
    if isinstance(deployment, OpenAIDeployment):
        ref.base_url = deployment.base_url
        ref.upstream_model = deployment.model or model
    return ref
