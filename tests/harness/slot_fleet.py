"""A pool's broker and gateways that lease its slots, without processes: messages take a moment, engines take their
time, and everything can be killed. Runs in the time of the event loop, which may be a virtual one.
"""

import asyncio
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from helixflow.clients.pool import DeploymentView
from helixflow.core.call import Call
from helixflow.core.capacity import Replica
from helixflow.core.errors import HelixError
from helixflow.pool.slot_broker import SlotBroker
from helixflow.pool.slot_session import Session
from helixflow.routing.slots import ReplicaSlots
from helixflow.rpc.generated.pool_v1.pool_pb2 import LeaseSlotsRequest, LeaseSlotsResponse
from tests.harness.routing import make_call

LATENCY_S = 0.001


class LoopClock:
    """The time of the running loop."""

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    def now(self) -> float:
        return self.monotonic()


class Engines:
    """What runs on each replica. More than a replica has slots is never asked of it."""

    def __init__(self, slots: Mapping[str, int]) -> None:
        self.slots = dict(slots)
        self.running: Counter[str] = Counter()
        self.most: Counter[str] = Counter()

    @contextmanager
    def generation(self, replica_id: str) -> Iterator[None]:
        self.running[replica_id] += 1
        self.most[replica_id] = max(self.most[replica_id], self.running[replica_id])
        assert self.running[replica_id] <= self.slots[replica_id], "more generations than slots"
        try:
            yield
        finally:
            self.running[replica_id] -= 1

    def view(self) -> DeploymentView:
        replicas = (Replica(name, "127.0.0.1", 1, "key", slots, 100) for name, slots in self.slots.items())
        return DeploymentView("d", "ready" if self.slots else "loading", "", 0, 0, tuple(replicas))


class Pool:
    """One broker, restarted at will."""

    def __init__(self, engines: Engines, *, max_queue: int = 10_000) -> None:
        self.engines = engines
        self._max_queue = max_queue
        self._due = asyncio.Event()
        self.broker: SlotBroker | None = None
        self.start(inherited=False)

    def start(self, *, inherited: bool = True) -> None:
        self.broker = SlotBroker(max_queue=self._max_queue, clock=LoopClock(), on_change=self._due.set)
        self.broker.update(self.engines.slots, inherited=self.engines.slots if inherited else ())
        self._due.set()

    def kill(self) -> None:
        self.broker = None

    async def run(self) -> None:
        while True:
            await self._due.wait()
            self._due.clear()
            await asyncio.sleep(0.05)
            broker = self.broker
            if broker is None:
                continue
            for name in broker.stock.overdue():
                broker.stock.found(name, self.engines.running[name], broker.reported_of(name))
            if broker.stock.conclude():
                broker.serve()
            if broker.tell() or broker.stock.missing:
                self._due.set()


class Gateway:
    """One gateway with its slots. `connect` it; `kill` takes its generations along."""

    def __init__(self, name: str, pool: Pool, *, load_wait_s: float = 30) -> None:
        self.name = name
        self.pool = pool
        self.slots = ReplicaSlots(
            "d", max_queue=10_000, load_wait_s=load_wait_s, request_load=lambda _: None, clock=LoopClock()
        )
        self.desk = self.slots.desk("")
        self.desk.expect()
        self.slots.update(pool.engines.view())
        self.calls: set[asyncio.Task[None]] = set()
        self.refused: list[HelixError] = []
        self._epoch = 0
        self._session: Session | None = None
        self._broker: SlotBroker | None = None

    def connect(self) -> None:
        self._epoch += 1
        epoch, broker = self._epoch, self.pool.broker
        assert broker is not None
        self._broker = broker

        down: deque[bytes] = deque()
        up: deque[bytes] = deque()

        def to_gateway(message: LeaseSlotsResponse) -> None:
            down.append(message.SerializeToString())
            self._later(epoch, broker, lambda: self.desk.receive(LeaseSlotsResponse.FromString(down.popleft())))

        def to_pool(message: LeaseSlotsRequest) -> None:
            up.append(message.SerializeToString())
            self._later(epoch, broker, lambda: receive(LeaseSlotsRequest.FromString(up.popleft())))

        def receive(message: LeaseSlotsRequest) -> None:
            if message.WhichOneof("kind") == "open":
                self._session = broker.join(message.open.gateway, message.open.holding, to_gateway)
            else:
                assert self._session is not None
                broker.receive(self._session, message)

        self.desk.open(to_pool, self.name, "d")

    def _later(self, epoch: int, broker: SlotBroker, action: Callable[[], None]) -> None:
        def act() -> None:
            if epoch == self._epoch and broker is self.pool.broker:
                action()

        asyncio.get_running_loop().call_later(LATENCY_S, act)

    def disconnect(self) -> None:
        """The stream breaks; both ends notice."""
        self._epoch += 1
        if self._broker is not None and self._broker is self.pool.broker and self._session is not None:
            self._broker.leave(self._session)
        self._session = self._broker = None
        self.desk.lose()

    async def kill(self, *, sockets_close_s: float = 0.0) -> None:
        """The process is gone; its sockets close, and engines notice."""
        self._epoch += 1
        if self._broker is not None and self._broker is self.pool.broker and self._session is not None:
            self._broker.leave(self._session)
        self._session = None
        await asyncio.sleep(sockets_close_s)
        for call in self.calls:
            call.cancel()
        await asyncio.gather(*self.calls, return_exceptions=True)

    def serve(self, call: Call, held_s: float, tokens: int, used: Counter[str] | None = None) -> "asyncio.Task[None]":
        """A request whose generation makes `tokens` evenly in `held_s`."""
        task = asyncio.create_task(self._serve(call, held_s, tokens, used))
        self.calls.add(task)
        task.add_done_callback(self.calls.discard)
        return task

    async def _serve(self, call: Call, held_s: float, tokens: int, used: Counter[str] | None) -> None:
        try:
            lease = await self.slots.acquire(call)
        except HelixError as exc:
            self.refused.append(exc)
            return
        try:
            with self.pool.engines.generation(lease.replica.replica_id):
                for _ in range(tokens):
                    await asyncio.sleep(held_s / tokens)
                    lease.charge(1)
                    if used is not None:
                        used[call.principal.organisation_id] += 1
        finally:
            lease.release()


async def flood(gateway: Gateway, call: Callable[[], Call], used: Counter[str], *, clients: int, held_s: float,
                tokens: int, rng: random.Random) -> None:  # fmt: skip
    """So many clients at one gateway that ask again and again. Ends by being cancelled."""

    async def ask() -> None:
        while True:
            factor = rng.uniform(0.5, 1.5)
            await gateway.serve(call(), held_s * factor, max(1, round(tokens * factor)), used)

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(ask())


def call_of(organisation: str, key: str = "k", *, weight: int = 100, key_weight: int = 100, priority: int = 0,
            left_s: float = 1e6, **fields: Any) -> Call:  # fmt: skip
    call = make_call(deadline=asyncio.get_running_loop().time() + left_s, organisation=organisation, key=key, **fields)
    call.principal = replace(call.principal, organisation_weight=weight, weight=key_weight, priority=priority)
    return call


async def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)
