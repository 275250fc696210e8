"""Which deployments there are, as prices are asked for."""

from collections.abc import Iterable

from helixflow.rpc.generated.auth_v1 import metering_pb2
from helixflow.settings.deployments import Deployment, ProviderDeployment
from helixflow.settings.models import ModelSettings


def deployment_refs(models: Iterable[ModelSettings]) -> list[metering_pb2.DeploymentRef]:
    """All deployments of these models, in order. The models are complete: what the catalogue fills in is there."""
    return [_ref(name, model.name, deployment) for model in models for name, deployment in model.named_deployments()]


def _ref(name: str, model: str, deployment: Deployment) -> metering_pb2.DeploymentRef:
    ref = metering_pb2.DeploymentRef(deployment=name, model=model, engine=deployment.engine)
    if isinstance(deployment, ProviderDeployment):
        ref.base_url = deployment.base_url
        ref.upstream_model = deployment.model or model
    return ref
