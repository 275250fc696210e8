"""The serving configuration as the auth service tells it, and what becomes of it as it is told."""

from collections.abc import Callable
from typing import Final

import grpc

from helixflow.clients.watching import Watch
from helixflow.rpc.errors import from_rpc_error
from helixflow.rpc.generated.auth_v1 import configuration_pb2 as pb
from helixflow.rpc.generated.auth_v1 import configuration_pb2_grpc

REPORT_TIMEOUT_S: Final = 5.0


class ServingWatch:
    """Follows the configuration for one process. `on_change(revision, document)` is called with every one that comes,
    also with the one in force when the watch begins anew; it must not block.
    """

    def __init__(
        self, channel: grpc.aio.Channel, instance: str, service: str, node: str, on_change: Callable[[int, bytes], None]
    ) -> None:
        self._stub = configuration_pb2_grpc.ServingServiceStub(channel)
        self._instance = instance
        self._request = pb.WatchServingRequest(instance=instance, service=service, node=node)
        self._on_change = on_change

    async def run(self) -> None:
        """Until cancelled. While the service is away, nothing changes."""
        await Watch("serving configuration", self._open_watch, self._on_message, lambda: None).run()

    async def report(self, revision: int, problem: str = "") -> None:
        """Which version is served here, and why no later one. Raises `HelixError`."""
        request = pb.ReportServingRequest(instance=self._instance, revision=revision, problem=problem)
        try:
            await self._stub.ReportServing(request, timeout=REPORT_TIMEOUT_S)
        except grpc.RpcError as exc:
            raise from_rpc_error(exc) from exc

    def _open_watch(self, timeout_s: float) -> object:
        return self._stub.WatchServing(self._request, timeout=timeout_s)

    def _on_message(self, message: pb.WatchServingResponse, _first: bool) -> None:
        self._on_change(message.revision, message.document)
