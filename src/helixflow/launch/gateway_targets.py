"""The deployments that one gateway can try, each with what it is made of: over changes of the configuration, those that
stay the same are kept.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from helixflow.core.call import Completer
from helixflow.core.capacity import Limited, Slots
from helixflow.core.clock import Clock
from helixflow.launch.gateway_engines import EngineBuilder
from helixflow.pki.files import Version, version_of
from helixflow.routing.target import Target
from helixflow.settings.deployments import Deployment, ProviderDeployment, RoutedDeployment
from helixflow.settings.models import ModelSettings
from helixflow.settings.serving import RoutingSettings
from helixflow.transport.client import HttpClient

# What routing knows, and no engine is made of.
_ROUTED: Final = set(RoutedDeployment.model_fields)

log = structlog.get_logger("helixflow.gateway")


@dataclass(frozen=True, slots=True)
class Deployed:
    """One deployment. `client` is its own HTTP client, if it has one; `key` tells one content of its key from another;
    `key_version` is that of the key's file.
    """

    target: Target
    client: HttpClient | None
    key: str
    key_version: Version | None

    @property
    def settings(self) -> Deployment:
        return self.target.settings


class TargetBuilder:
    """Makes targets. So many `gateways` share the ceilings of deployments."""

    def __init__(self, engines: EngineBuilder, routing: RoutingSettings, clock: Clock, gateways: int) -> None:
        self._engines = engines
        self._routing = routing
        self._clock = clock
        self._gateways = gateways

    def deploy(
        self,
        models: Sequence[ModelSettings],
        slots: Mapping[str, Slots],
        before: Mapping[str, Deployed],
    ) -> dict[str, Deployed]:
        """All deployments of these models, by name: those of `before` where nothing has changed. Reads files: call it
        in a thread.

        Where only what routing knows has changed, engine and health stay. `slots` are those of launched deployments.
        Raises `UserError` (CONFIG) for one that cannot be built.
        """
        deployed = {}
        for model in models:
            for name, deployment in model.named_deployments():
                deployed[name] = self._deploy(name, model.name, deployment, slots.get(name), before.get(name))
        return deployed

    def _deploy(
        self,
        name: str,
        model: str,
        deployment: Deployment,
        slots: Slots | None,
        before: Deployed | None,
    ) -> Deployed:
        key, version = _key_of(deployment)
        if before is not None and _engine_part(before.settings) == _engine_part(deployment):
            if key is None:
                # It goes on with the key that it has.
                log.warning("deployment.key_unreadable", deployment=name)
            if key in (None, before.key):
                return self._keep(name, deployment, before, version)
        engine, client = self._engines.build(name, model, deployment, slots)
        return Deployed(self._target(name, engine, deployment, slots), client, key or "", version)

    def _keep(self, name: str, deployment: Deployment, before: Deployed, version: Version | None) -> Deployed:
        target = before.target
        if before.settings != deployment:
            target = self._target(name, target.engine, deployment, target.slots)
            target.health, target.latency = before.target.health, before.target.latency
            target.whole_latency = before.target.whole_latency
            target.ceiling = before.target.ceiling.changed(deployment)
        return Deployed(target, before.client, before.key, version)

    def _target(self, name: str, engine: Completer, deployment: Deployment, slots: Slots | None) -> Target:
        return Target(
            name,
            engine,
            deployment,
            routing=self._routing,
            clock=self._clock,
            slots=slots,
            gateways=self._gateways,
            limits=engine.limits if isinstance(engine, Limited) else None,
        )


def changed_keys(deployed: Mapping[str, Deployed]) -> list[str]:
    """The deployments whose key files are not those that were read. Looks at files: call it in a thread."""
    return [name for name, one in deployed.items() if _key_version(one.settings) != one.key_version]


def _key_of(deployment: Deployment) -> tuple[str | None, Version | None]:
    """A digest of the key's content, '' without one, None when it cannot be read; and the version of its file."""
    version = _key_version(deployment)
    if not isinstance(deployment, ProviderDeployment) or deployment.api_key is None:
        return "", version
    try:
        return hashlib.sha256(deployment.api_key.read().encode()).hexdigest(), version
    except ValueError:
        return None, version


def _key_version(deployment: Deployment) -> Version | None:
    file = deployment.api_key_file if isinstance(deployment, ProviderDeployment) else None
    return version_of(file.expanduser()) if file is not None else None


def _engine_part(deployment: Deployment) -> str:
    return deployment.model_dump_json(exclude=_ROUTED)
