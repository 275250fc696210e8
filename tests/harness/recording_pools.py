"""Pools as the auth service asks them: one, which remembers what was asked of it."""

from collections.abc import Sequence

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import fleet_pb2 as pb


class RecordingPools:
    """Implements `auth.fleet.Pools` with the pool `a`."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []

    async def describe(self) -> Sequence[pb.Pool]:
        return [pb.Pool(name="a", reachable=True)]

    async def load(self, pool: str, deployment: str) -> None:
        self._note("load", pool, deployment)

    async def unload(self, pool: str, deployment: str) -> None:
        self._note("unload", pool, deployment)

    async def pin(self, pool: str, deployment: str, *, pinned: bool) -> None:
        self._note("pin", pool, deployment, pinned)

    async def scale(self, pool: str, deployment: str, replicas: int) -> None:
        self._note("scale", pool, deployment, replicas)

    async def drain(self, pool: str, *, resume: bool) -> None:
        self._note("drain", pool, resume)

    def _note(self, *asked: object) -> None:
        if asked[1] != "a":
            raise HelixError(ErrorKind.NOT_FOUND, "There is no such pool.", param="pool")
        self.asked.append(asked)
