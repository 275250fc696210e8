"""A gateway that follows the serving configuration and the files of its providers' keys."""

import asyncio
from typing import Final

import grpc
import structlog

from helixflow.core.errors import HelixError, UserError
from helixflow.launch.gateway_metering import GatewayMetering
from helixflow.launch.gateway_models import GatewayModels
from helixflow.launch.serving_follower import ServingFollower
from helixflow.settings.configuration import Models

KEY_POLL_S: Final = 1.0

log = structlog.get_logger("helixflow.gateway")


class GatewayServing:
    """`run` it while the gateway serves."""

    def __init__(
        self, channel: grpc.aio.Channel, models: GatewayModels, metering: GatewayMetering | None, node: str = ""
    ) -> None:
        self._models = models
        self._metering = metering
        self._follower = ServingFollower(channel, "gateway", node, self._take)

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follower.run(), name="serving configuration")
            tasks.create_task(self._follow_keys(), name="key files")

    async def _take(self, models: Models) -> None:
        if models != self._models.models:
            await self._models.apply(models, self._metering)
            log.info("models.changed", models=len(models))

    async def _follow_keys(self) -> None:
        told = ""
        while True:
            await asyncio.sleep(KEY_POLL_S)
            problem = ""
            try:
                renewed = await self._models.renew_keys(self._metering)
            except (UserError, HelixError) as exc:
                problem, renewed = exc.message, []
            if renewed:
                log.info("keys.renewed", deployments=renewed)
            if problem and problem != told:
                log.error("keys.refused", reason=problem, advice="the keys from before stay in use")
            told = problem
