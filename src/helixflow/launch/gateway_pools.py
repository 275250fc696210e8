"""The pools that one gateway uses: which replicas there are, whose slots they have, and loading on request."""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from ssl import SSLContext
from typing import Final

import grpc
import structlog

from helixflow.clients.fleet import merge_views, rank_of
from helixflow.clients.pool import DeploymentView, PoolWatch, RemotePool
from helixflow.clients.registry import PoolAddress, RegistryWatch
from helixflow.clients.tokenizers import TokenizerCache
from helixflow.core.call import Call
from helixflow.core.errors import HelixError
from helixflow.launch.slot_links import SlotLinks
from helixflow.pki.contexts import PeerContext
from helixflow.pki.identity import ServiceIdentity
from helixflow.routing.balancing import Balancer
from helixflow.routing.seats import Seat
from helixflow.routing.slots import ReplicaSlots
from helixflow.rpc.channels import create_channel
from helixflow.rpc.sockets import socket_path
from helixflow.settings.deployments import LaunchedDeployment
from helixflow.settings.tree import Settings
from helixflow.telemetry.metrics import DeploymentRow

# The name under which this node's own pool is known here; `Replica.pool` of its replicas.
LOCAL: Final = ""

log = structlog.get_logger("helixflow.gateway")


class PoolLink:
    """One pool that is followed: `channel` for its PoolService, `watch` for its replicas."""

    def __init__(
        self,
        name: str,
        address: PoolAddress | None,
        channel: grpc.aio.Channel,
        on_change: Callable[[Collection[str]], None],
        tokenizers: TokenizerCache,
    ) -> None:
        """Without `address` it is the pool of this node. `on_change` is told which deployments have changed."""
        self.name = name
        self.address = address
        self.channel = channel
        remote = None
        if address is not None:
            host, _, port = address.data_address.rpartition(":")
            remote = RemotePool(name, host.strip("[]"), int(port), tokenizers)
        self.watch = PoolWatch(channel, self._on_views, remote=remote)
        self.following: asyncio.Task[None] | None = None
        self._on_change = on_change
        self._shown: Mapping[str, DeploymentView] = {}

    def _on_views(self, views: Mapping[str, DeploymentView]) -> None:
        shown, self._shown = self._shown, views
        self._on_change({name for name in shown.keys() | views.keys() if shown.get(name) != views.get(name)})


class GatewayPools:
    """This node's pool, and those of other nodes that have registered. `run` it while the gateway serves, `close` it
    at the end.

    `views` is what all pools last said of the deployments they serve. It stays while a pool cannot be reached: that the
    pool is gone is said by the registry, and that a replica is gone by the connections to it. While the registry is
    away the pools stay as they are.
    """

    def __init__(
        self, settings: Settings, identity: ServiceIdentity, control: grpc.aio.Channel | None, balancer: Balancer
    ) -> None:
        """`control` leads to the registry of pools; without it there is this node's alone. `balancer` chooses replicas.

        Raises `UserError` (CONFIG, STORAGE).
        """
        self._settings = settings
        self._identity = identity
        self._tls = PeerContext(identity, server_side=False)
        self._registry = RegistryWatch(control, self._on_pools) if control is not None else None
        self._tokenizers = TokenizerCache(settings.data_dir / "cache" / "tokenizers")
        self._links: dict[str, PoolLink] = {}
        # Whether it was ever told of all pools.
        self._knows_all = control is None
        self._group: asyncio.TaskGroup | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._slots: dict[str, ReplicaSlots] = {}
        self._launched: dict[str, LaunchedDeployment] = {}
        self._balancer = balancer
        self._indifferent: set[str] = set()
        self._loads: set[asyncio.Task[None]] = set()
        self._leases = SlotLinks()
        self.views: Mapping[str, DeploymentView] = {}
        self._add(LOCAL, None)

    async def run(self) -> None:
        """Follows the pools, until cancelled."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            self._leases.begin(group)
            for link in self._links.values():
                link.following = group.create_task(link.watch.run(), name=f"replicas {link.name}")
            if self._registry is not None:
                group.create_task(self._registry.run(), name="pools")
            group.create_task(self._tls.follow(), name="identity towards replicas")

    async def close(self) -> None:
        """Ends loads that were asked for, and the channels. Cancel `run` before."""
        self._group = None
        for task in self._loads:
            task.cancel()
        await asyncio.gather(*self._loads, return_exceptions=True)
        await asyncio.gather(*self._closing, *(link.channel.close() for link in self._links.values()))

    def tls(self) -> SSLContext:
        """For connections to replicas on other nodes, as this gateway's certificate is now."""
        return self._tls.context

    def channel_of(self, pool: str) -> grpc.aio.Channel | None:
        """The channel to the pool of that name (`Replica.pool`); None for one that is not there any more."""
        link = self._links.get(pool)
        return link.channel if link is not None else None

    def open_slots(self, name: str, deployment: LaunchedDeployment, *, affinity: bool = True) -> ReplicaSlots:
        """The slots of a deployment, from now on until `close_slots`; those that it has, if it is open already. With
        `affinity`, prompts that begin alike go to the same replica.
        """
        self._launched[name] = deployment
        if affinity:
            self._indifferent.discard(name)
        else:
            self._indifferent.add(name)
        if (known := self._slots.get(name)) is not None:
            known.max_queue = deployment.max_queue
            return known
        slots = self._slots[name] = ReplicaSlots(
            name,
            max_queue=deployment.max_queue,
            load_wait_s=self._settings.gateway.load_wait_s,
            request_load=self._request_load,
            choose=partial(self._choose, name),
            forget=self._balancer.forget,
        )
        self._keep_leases()
        if (view := self.views.get(name)) is not None:
            slots.update(view)
        self._note_missing()
        return slots

    def close_slots(self, name: str) -> None:
        """The deployment is not served any more; leases that are out stay good until they are released."""
        self._slots.pop(name).close()
        self._keep_leases()
        del self._launched[name]
        self._indifferent.discard(name)

    def _choose(self, deployment: str, seats: Sequence[Seat], call: Call) -> Seat:
        return self._balancer.choose(seats, call, deployment, affinity=deployment not in self._indifferent)

    def problems(self) -> list[str]:
        """Models that are to be loaded from the start and are not. One that was unloaded since, or found no room, comes
        back when it is asked for; one on drained pools only is gone because somebody wants it so.
        """
        views = self.views
        if self._slots and not views:
            return ["the pool has not been reached yet"]
        return [
            f"{name} is {view.state}"
            for name, deployment in self._launched.items()
            if deployment.load == "start"
            and (view := views.get(name)) is not None
            and view.state not in ("ready", "idle", "unloading", "draining")
        ]

    def rows(self) -> list[DeploymentRow]:
        """For metrics."""
        rows = []
        for name, slots in self._slots.items():
            view = self.views.get(name)
            serving, restarts = (len(view.replicas), view.restarts) if view is not None else (0, 0)
            rows.append(
                DeploymentRow(name, slots.queued, slots.first_place, slots.in_flight, serving, restarts, slots.figures)
            )
        return rows

    def _on_pools(self, pools: Mapping[str, PoolAddress], left: Collection[str] | None) -> None:
        """The set of pools on other nodes, as the registry knows it now: all of it, or with those that have `left`."""
        if left is None:
            self._knows_all = True
        for name, address in pools.items():
            link = self._links.get(name)
            if link is not None and link.address != address:
                self._remove(link)
                link = None
            if link is None:
                log.info("pool.added", pool=name, address=address.address)
                self._add(name, address)
        missing = [link for name, link in self._links.items() if name != LOCAL and name not in pools]
        for link in missing:
            if left is None or link.name in left:
                log.info("pool.removed", pool=link.name)
                self._remove(link)
        self._note_missing()

    def _add(self, name: str, address: PoolAddress | None) -> None:
        target = socket_path(self._settings.run_dir, "pool") if address is None else address.address
        channel = create_channel(target, self._identity, "pool")
        link = self._links[name] = PoolLink(name, address, channel, self._merge, self._tokenizers)
        if self._group is not None:
            link.following = self._group.create_task(link.watch.run(), name=f"replicas {name}")

    def _remove(self, link: PoolLink) -> None:
        """Its replicas get no new requests; those that run go on."""
        del self._links[link.name]
        if link.following is not None:
            link.following.cancel()
        task = asyncio.create_task(link.channel.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        self._merge(link.watch.views.keys())

    def _merge(self, deployments: Collection[str]) -> None:
        """Sees anew what all pools say of these deployments, and tells their slots of what has changed."""
        self._keep_leases()
        views = dict(self.views)
        for name in deployments:
            known = [view for link in self._links.values() if (view := link.watch.views.get(name)) is not None]
            view = merge_views(known) if known else _gone(name)
            if views.get(name) == view:
                continue
            if known:
                views[name] = view
            else:
                views.pop(name, None)
            if name in self._slots:
                self._slots[name].update(view)
        self.views = views
        self._note_missing()

    def _note_missing(self) -> None:
        """Tells the slots of deployments that no pool has, as far as all have been heard."""
        if self._knows_all and all(link.watch.heard for link in self._links.values()):
            for name in self._slots.keys() - self.views.keys():
                self._slots[name].update(_gone(name))

    def _keep_leases(self) -> None:
        """Slots are leased from every pool that has the deployment."""
        self._leases.keep(
            {
                (link.name, name): (link.channel, self._slots[name].desk(link.name))
                for link in self._links.values()
                for name in link.watch.views
                if name in self._slots
            }
        )

    def _request_load(self, deployment: str) -> None:
        task = asyncio.create_task(self._load(deployment))
        self._loads.add(task)
        task.add_done_callback(self._loads.discard)

    async def _load(self, deployment: str) -> None:
        """Asks the pools that have it, the likeliest first, until one takes it on; those that drain load nothing."""
        views = ((link, link.watch.views.get(deployment)) for link in self._links.values())
        able = [(rank_of(view), link) for link, view in views if view is not None and view.state != "draining"]
        for _, link in sorted(able, key=lambda one: one[0]):
            try:
                await link.watch.load(deployment)
                return
            except HelixError as exc:
                log.warning(
                    "deployment.load_refused",
                    deployment=deployment,
                    pool=link.name,
                    code=exc.code,
                    reason=exc.message,
                )


def _gone(deployment: str) -> DeploymentView:
    """No pool has it, or none has it any more."""
    return DeploymentView(deployment, "gone", "", 0, 0, ())
