"""One deployment as the router sees it: what it can take, how it does, and who is with it now."""

from typing import Final

from helixflow.core.call import Completer
from helixflow.core.capacity import ProviderLimits, Slots
from helixflow.core.clock import Clock
from helixflow.routing.ceilings import Ceiling
from helixflow.routing.health import Health
from helixflow.routing.latency import Latency
from helixflow.settings.deployments import Deployment, LaunchedDeployment
from helixflow.settings.serving import RoutingSettings

# Of a provider whose ceiling is not known: only how its deployments compare matters.
_UNKNOWN_CAPACITY = 16


class Target:
    """A deployment that can be tried. Lives as long as its settings stay the same, over reloads of the others.

    `in_flight` counts calls that were given to it and have not ended. `slots` are those of a deployment that pools
    launch, None for a provider's. Implements `balancing.Seat`.
    """

    __slots__ = (
        "capacity",
        "ceiling",
        "context",
        "deployment",
        "engine",
        "health",
        "in_flight",
        "latency",
        "region",
        "seat_id",
        "settings",
        "slots",
        "tier",
        "weight",
        "whole_latency",
    )

    is_measured: Final = True

    def __init__(
        self,
        name: str,
        engine: Completer,
        deployment_settings: Deployment,
        *,
        routing: RoutingSettings,
        clock: Clock,
        slots: Slots | None,
        gateways: int = 1,
        limits: ProviderLimits | None = None,
    ) -> None:
        """`name` is the deployment's in records and metrics (`<model>/<name within the model>`). So many `gateways`
        share its ceilings; `limits` is what the engine learns of its provider's.
        """
        self.deployment = self.seat_id = name
        self.engine = engine
        self.settings = deployment_settings
        self.context = deployment_settings.context
        self.tier = deployment_settings.tier
        self.weight = deployment_settings.weight
        self.region = deployment_settings.region or ""
        self.slots = slots
        self.health = Health(routing, clock)
        self.ceiling = Ceiling(deployment_settings, clock, gateways=gateways, limits=limits)
        self.latency = Latency(routing.latency_half_life_s)
        self.whole_latency = Latency(routing.latency_half_life_s)
        self.in_flight = 0
        if isinstance(deployment_settings, LaunchedDeployment):
            self.capacity = deployment_settings.parallel * deployment_settings.replicas
        else:
            self.capacity = deployment_settings.max_concurrency or _UNKNOWN_CAPACITY

    def latency_s(self, now: float) -> float:
        """Until the first content."""
        return self.latency.estimate(now)

    def whole_latency_s(self, now: float) -> float:
        """Until all of an answer was there that did not say when it began: that of a provider which was not asked for
        a stream.
        """
        return self.whole_latency.estimate(now)
