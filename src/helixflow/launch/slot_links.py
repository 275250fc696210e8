"""The streams over which this process leases slots: one for each deployment at each pool that has it."""

import asyncio
import os
import secrets
import socket
from collections.abc import Mapping

import grpc

from helixflow.clients.slot_link import SlotLink
from helixflow.routing.slot_desk import SlotDesk

# A pool and a deployment.
Place = tuple[str, str]


class SlotLinks:
    """Nothing is leased before `run`: until then all slots count as this process's own."""

    def __init__(self) -> None:
        self._gateway = f"{socket.gethostname()[:64]}-{os.getpid()}-{secrets.token_hex(4)}"
        self._tasks: dict[Place, asyncio.Task[None]] = {}
        self._group: asyncio.TaskGroup | None = None

    def begin(self, group: asyncio.TaskGroup) -> None:
        """From now on links are kept, by tasks of this group."""
        self._group = group

    def keep(self, wanted: Mapping[Place, tuple[grpc.aio.Channel, SlotDesk]]) -> None:
        """These links and no others."""
        if self._group is None:
            return
        for place in self._tasks.keys() - wanted.keys():
            self._tasks.pop(place).cancel()
        for place, (channel, desk) in wanted.items():
            if place not in self._tasks:
                pool, deployment = place
                desk.expect()
                link = SlotLink(channel, deployment, self._gateway, desk)
                self._tasks[place] = self._group.create_task(link.run(), name=f"slots of {deployment} at {pool}")
