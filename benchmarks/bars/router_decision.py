"""What a routing decision costs with 64 deployments and 100,000 known beginnings, and what those take in memory."""

import random
import time
import tracemalloc
from collections.abc import Callable

import msgspec

from benchmarks.report import Options, Result, median, spread
from helixflow.core.call import Call, Hints, Operation
from helixflow.core.clock import SystemClock
from helixflow.core.principal import Principal, PrincipalKind
from helixflow.dialects.openai_chat import parse_chat
from helixflow.dialects.validation import decode_fields
from helixflow.engines.answers import WholeAnswer
from helixflow.routing.affinity import PrefixTable
from helixflow.routing.balancing import Balancer
from helixflow.routing.candidates import Candidates
from helixflow.routing.table import Route, build_table
from helixflow.routing.target import Target
from helixflow.settings.deployments import OpenAIDeployment
from helixflow.settings.models import ModelSettings
from helixflow.settings.serving import RoutingSettings

DEPLOYMENTS = 64
ENTRIES = 100_000
LIMIT_US = 15.0
LIMIT_MIB = 64.0
_SYSTEM_BYTES = 4_600  # about 1,000 tokens
# So many at a time as a gateway may have at hand: just read, and so in the processor's cache.
_BATCH = 32
_SAMPLES = 60


class _Nobody:
    """An engine that is never asked."""

    async def open(self, call: Call) -> WholeAnswer:
        raise AssertionError("decisions are measured, not calls")


def run(options: Options) -> list[Result]:
    chance = random.Random(1)
    before, peak, prefixes = _filled(chance)
    memory = (peak - before) / 2**20
    route = _route(chance)
    clock = SystemClock()
    balancer = Balancer(
        prefixes, load_guard=RoutingSettings().load_guard, monotonic=clock.monotonic, random_unit=chance.random
    )
    samples = _SAMPLES // 4 if options.quick else _SAMPLES

    def measure(make: Callable[[int], Call], *, again: bool) -> list[float]:
        """Microseconds of CPU a decision, one value a batch; `again`: of prompts that were routed before."""
        times = []
        for sample in range(samples):
            calls = [make(sample * _BATCH + number) for number in range(_BATCH)]
            for turn in range(2 if again else 1):
                started = time.process_time()
                for call in calls:
                    Candidates(route, call, balancer, None).next()
                if turn == int(again):
                    times.append((time.process_time() - started) / _BATCH * 1e6)
        return times

    kinds = {
        "a known beginning": measure(lambda n: _call(f"{n} "), again=True),
        "a new beginning": measure(lambda n: _call(f"{n + 10**6} "), again=False),
        "a session": measure(lambda n: _call("", session=f"s{n}"), again=True),
        "a short prompt": measure(lambda n: _call(f"{n}", size=0), again=False),
    }
    results = [
        Result("router_decision", what, median(times), "µs", LIMIT_US, detail=spread(times))
        for what, times in kinds.items()
    ]
    detail = f"{len(prefixes)} beginnings"
    return [*results, Result("router_decision", "remembered beginnings", memory, "MiB", LIMIT_MIB, detail=detail)]


def _filled(chance: random.Random) -> tuple[int, int, PrefixTable]:
    """The memory that was allocated before and at most; and a full table. At least half of one is remembered."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    prefixes = PrefixTable(entries=2 * ENTRIES, block_bytes=RoutingSettings().prefix_block_bytes)
    for number in range(ENTRIES // 5):
        prefixes.remember([chance.getrandbits(62) for _ in range(10)], f"m/openai-{number % DEPLOYMENTS}")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return before, peak, prefixes


def _route(chance: random.Random) -> Route:
    deployments = tuple(OpenAIDeployment(engine="openai", base_url="http://127.0.0.1/v1") for _ in range(DEPLOYMENTS))
    model = ModelSettings(name="m", deployments=deployments)
    routing, clock = RoutingSettings(), SystemClock()
    targets = {}
    for name, deployment in model.named_deployments():
        target = targets[name] = Target(name, _Nobody(), deployment, routing=routing, clock=clock, slots=None)
        target.in_flight = chance.randrange(4)
        target.latency.measure(chance.uniform(0.1, 0.2), clock.monotonic())
    return build_table([model], targets, created=0).routes["m"]


def _call(beginning: str, *, size: int = _SYSTEM_BYTES, session: str = "") -> Call:
    messages = [
        {"role": "system", "content": (beginning + "You are a helpful assistant of a company. " * 200)[:size]},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    body = msgspec.json.encode({"model": "m", "messages": messages})
    principal = Principal(PrincipalKind.KEY, "key", "key", "organisation", "project")
    call = Call(
        "c", "r", principal, Operation.CHAT, "m", decode_fields(body), parse_chat(body), True, False, 600, len(body)
    )
    call.hints = Hints(session=session)
    return call
