"""Two replicas of a real engine and eight tenants, each with a system prompt of 1,000 tokens of its own: what it is
worth that requests return to where their prompt is cached. And what it costs where no prompt comes again.

The replicas are those of a node; who gets which is decided here, so that the ways can be compared: by prefix affinity,
as gateways do; in turn; to the least loaded. A replica's prompt cache has room for five of these prompts (24 MB each):
for its share of the tenants and not for all, as on a busy one.
"""

import asyncio
import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec
import uvloop

from benchmarks.bars.startup import DATA_DIR, pull_model
from benchmarks.report import Options, Result, median, spread
from benchmarks.targets import Target, serve
from helixflow.clients.pool import DeploymentView, PoolWatch
from helixflow.core.call import Call, Operation
from helixflow.core.clock import SystemClock
from helixflow.core.principal import Principal, PrincipalKind
from helixflow.dialects.openai_chat import parse_chat
from helixflow.dialects.validation import decode_fields
from helixflow.engines.llama_cpp.engine import LlamaCppEngine
from helixflow.pki.identity import ServiceIdentity
from helixflow.routing.balancing import Balancer
from helixflow.routing.slots import Choose, ReplicaSlots, least_loaded
from helixflow.rpc.channels import create_channel
from helixflow.rpc.sockets import socket_path
from helixflow.settings.serving import RoutingSettings
from helixflow.settings.tree import DEFAULT_CHAT_MODEL, Settings
from helixflow.transport.client import HttpClient

TENANTS: Final = 8
REQUESTS: Final = 6  # of each tenant, in each round
CLIENTS: Final = 4
ANSWER_TOKENS: Final = 16
LIMIT_FIRST: Final = 0.5
LIMIT_SLOWER: Final = 1.03
MODELS: Final = f"""[metering]
enabled = false
[[models]]
name = "{DEFAULT_CHAT_MODEL}"
[[models.deployments]]
engine = "llama_cpp"
replicas = 2
parallel = 4
threads = 1
prompt_cache_mib = 128
"""
# The tokens with which the model ends a text: answers are all of the same length without them.
_NEVER_ENDING: Final = {"0": -100, "2": -100}
# About 1,000 tokens for the model's tokenizer, and about 100.
_SYSTEM_WORDS: Final = 980
_SHORT_WORDS: Final = 90
_STORY: Final = (
    "the river ran past the old mill where a young engineer measured water light and time with great care and every "
    "evening wrote down what had changed since the morning before she walked home along the narrow road"
)


@dataclass
class _Round:
    """Seconds to each first token; tokens a second of all together."""

    first_s: list[float] = field(default_factory=list)
    rate: float = 0.0


def run(options: Options) -> list[Result]:
    pull_model()
    with serve(MODELS, data_dir=DATA_DIR, pinned=False) as target:
        return uvloop.run(_measure(target, 1 if options.quick else 3))


async def _measure(target: Target, rounds: int) -> list[Result]:
    view = await _replicas(target)
    reuse: dict[str, list[_Round]] = {"affinity": [], "in turn": []}
    fresh: dict[str, list[_Round]] = {"affinity": [], "least loaded": []}
    client = HttpClient()
    try:
        for number in range(rounds):
            for way, done in reuse.items():
                prompts = _shared_prompts(f"{number} {way}", number)
                done.append(await _converse(client, view, _chooser(way), prompts))
        for number in range(rounds * 2):
            # Alternating who goes first cancels a drift of the machine.
            for way, done in list(fresh.items())[:: -1 if number % 2 else 1]:
                prompts = [(f"t{n % TENANTS}", _text(f"{number} {way} {n}", _SHORT_WORDS)) for n in range(24)]
                done.append(await _converse(client, view, _chooser(way), prompts))
    finally:
        await client.close()
    first = {way: median([s for one in done for s in one.first_s]) for way, done in reuse.items()}
    rate = {way: [one.rate for one in done] for way, done in reuse.items()}
    plain = {way: [one.rate for one in done] for way, done in fresh.items()}
    return [
        Result(
            "prefix_affinity",
            "p50 time to first token against in turn",
            first["affinity"] / first["in turn"],
            "×",
            LIMIT_FIRST,
            detail=f"{first['affinity']:.2f} s; in turn {first['in turn']:.2f} s",
        ),
        Result(
            "prefix_affinity",
            "tokens/s against in turn",
            median(rate["affinity"]) / median(rate["in turn"]),
            "×",
            1.0,
            at_least=True,
            detail=f"{spread(rate['affinity'])}; in turn {spread(rate['in turn'])}",
        ),
        Result(
            "prefix_affinity",
            "without reuse, time against least loaded",
            median(plain["least loaded"]) / median(plain["affinity"]),
            "×",
            LIMIT_SLOWER,
            detail=f"{spread(plain['affinity'])} tokens/s; least loaded {spread(plain['least loaded'])}",
        ),
    ]


def _chooser(way: str) -> Choose:
    if way == "least loaded":
        return least_loaded
    if way == "in turn":
        turns = itertools.count()
        return lambda seats, _call: seats[next(turns) % len(seats)]
    balancer = Balancer.of(RoutingSettings(), SystemClock())
    return lambda seats, call: balancer.choose(seats, call, "m")


def _shared_prompts(seed: str, order: int) -> list[tuple[str, str]]:
    """Tenants and their system prompts, in an order that is the same for both ways."""
    prompts = [(f"t{n}", _text(f"{seed} {n}", _SYSTEM_WORDS)) for n in range(TENANTS)] * REQUESTS
    random.Random(order).shuffle(prompts)
    return prompts


def _text(seed: str, words: int) -> str:
    chance, story = random.Random(seed), _STORY.split()
    return f"{seed}: " + " ".join(chance.choice(story) for _ in range(words))


async def _converse(
    client: HttpClient, view: DeploymentView, choose: Choose, prompts: Sequence[tuple[str, str]]
) -> _Round:
    slots = ReplicaSlots(view.deployment, max_queue=512, load_wait_s=60, request_load=lambda _name: None, choose=choose)
    slots.update(view)
    engine = LlamaCppEngine(client, slots, deployment=view.deployment, task="chat")
    waiting = iter(prompts)
    done = _Round()
    tokens = 0

    async def ask() -> None:
        nonlocal tokens
        for number, (tenant, system) in enumerate(waiting):
            call = _call(tenant, system, f"Question {number}: what did she write down?")
            started = time.perf_counter()
            stream = await engine.open(call)
            done.first_s.append(time.perf_counter() - started)
            try:
                while await stream.read():
                    pass
            finally:
                stream.close()
            tokens += call.progress.usage.completion_tokens

    started = time.perf_counter()
    async with asyncio.TaskGroup() as clients:
        for _ in range(CLIENTS):
            clients.create_task(ask())
    done.rate = tokens / (time.perf_counter() - started)
    slots.close()
    return done


def _call(tenant: str, system: str, question: str) -> Call:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    body = msgspec.json.encode(
        {
            "model": DEFAULT_CHAT_MODEL,
            "messages": messages,
            "max_tokens": ANSWER_TOKENS,
            "temperature": 0,
            "logit_bias": _NEVER_ENDING,
            "stream": True,
        }
    )
    principal = Principal(PrincipalKind.KEY, tenant, tenant, tenant, "project")
    deadline = asyncio.get_running_loop().time() + 600
    return Call(
        f"{random.getrandbits(128):032x}",
        "bench",
        principal,
        Operation.CHAT,
        DEFAULT_CHAT_MODEL,
        decode_fields(body),
        parse_chat(body),
        True,
        False,
        deadline,
        len(body),
    )


async def _replicas(target: Target) -> DeploymentView:
    """The node's two replicas, once both serve."""
    assert target.data_dir is not None
    identity = ServiceIdentity.open(Settings(data_dir=target.data_dir), "gateway")
    channel = create_channel(socket_path(target.data_dir / "run", "pool"), identity, "control")
    async with asyncio.timeout(120), channel:
        found: asyncio.Future[DeploymentView] = asyncio.get_running_loop().create_future()

        def look() -> None:
            for view in watch.views.values():
                if len(view.replicas) == 2 and not found.done():
                    found.set_result(view)

        watch = PoolWatch(channel, lambda _views: look())
        task = asyncio.create_task(watch.run())
        try:
            return await found
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
