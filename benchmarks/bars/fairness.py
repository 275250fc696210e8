"""One tenant floods a real model: what another one notices of it, and who gets how many tokens."""

import asyncio
import http.client
import json
import random
import time
from collections import Counter
from contextlib import aclosing
from dataclasses import dataclass, field

import uvloop

from benchmarks.bars.startup import DATA_DIR, pull_model
from benchmarks.report import Options, Result
from benchmarks.targets import Target, chat_body, serve
from helixflow.settings.tree import DEFAULT_CHAT_MODEL
from helixflow.transport.client import HttpClient, Timeouts, build_head
from helixflow.transport.origin import Origin

FIRST_TOKEN_LIMIT = 1.5
SHARE_LIMIT = 0.1
FLOOD = 50
_WEIGHTS = {"heavy": 300, "light": 100}
_CLIENTS_EACH = 8
_SLOTS = 4
_MODELS = (
    f'[[models]]\nname = "{DEFAULT_CHAT_MODEL}"\n[[models.deployments]]\nengine = "llama_cpp"\nparallel = {_SLOTS}\n'
)
_WORDS = (
    *("river", "stone", "cloud", "paper", "window", "garden", "silver"),
    *("market", "signal", "orange", "harbour", "winter", "candle", "forest"),
)


@dataclass(frozen=True, slots=True)
class Kind:
    """What a tenant asks: words of its prompt, none of which are cached, and tokens of the answer."""

    words: int
    answer: int


RARE = Kind(words=160, answer=16)
FLOODING = Kind(words=8, answer=8)


@dataclass(slots=True)
class Tenant:
    """Asks with one key, and remembers."""

    port: int
    key: str
    kind: Kind
    client: HttpClient
    rng: random.Random
    first_token_s: list[float] = field(default_factory=list)
    tokens: int = 0

    async def ask(self) -> None:
        words = " ".join(self.rng.choices(_WORDS, k=self.kind.words))
        body = chat_body(
            DEFAULT_CHAT_MODEL,
            f"{self.rng.random()} {words}",
            stream=True,
            max_tokens=self.kind.answer,
            logit_bias={"2": -100},
            stream_options={"include_usage": True},
        )
        origin = Origin("http", "127.0.0.1", self.port)
        headers = [("authorization", f"Bearer {self.key}"), ("content-type", "application/json")]
        head = build_head("POST", "/v1/chat/completions", origin, headers)
        began = time.perf_counter()
        response = await self.client.request(origin, head, body, timeouts=Timeouts())
        # Held back until the first content is there.
        self.first_token_s.append(time.perf_counter() - began)
        answer = await response.read_all(2**24)
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {answer[:300]!r}")
        usage = next(json.loads(line[6:])["usage"] for line in reversed(answer.split(b"\n")) if b'"usage":{' in line)
        self.tokens += usage["prompt_tokens"] + usage["completion_tokens"]

    async def ask_again(self, pause_s: float = 0.0) -> None:
        while True:
            await self.ask()
            await asyncio.sleep(pause_s)


def run(options: Options) -> list[Result]:
    pull_model()
    with serve(_MODELS, data_dir=DATA_DIR, pinned=False) as target:
        return uvloop.run(_measure(target, options))


async def _measure(target: Target, options: Options) -> list[Result]:
    window_s = 20.0 if options.quick else 60.0
    rng = random.Random(1)
    client = HttpClient(max_connections=256)

    def tenant(name: str, kind: Kind, weight: int = 100) -> Tenant:
        return Tenant(target.port, _make_key(target, name, weight), kind, client, rng)

    try:
        rare, flooding = tenant("rare", RARE), tenant("flooding", FLOODING)
        await rare.ask()
        alone_s = await _first_tokens(rare, window_s)
        async with aclosing(_Running([flooding.ask_again() for _ in range(FLOOD)])):
            await asyncio.sleep(3)
            flooded_s = await _first_tokens(rare, window_s)
        shares = {name: tenant(name, FLOODING, weight) for name, weight in _WEIGHTS.items()}
        runs = [one.ask_again() for one in shares.values() for _ in range(_CLIENTS_EACH)]
        async with aclosing(_Running(runs)):
            await asyncio.sleep(5)
            before = Counter({name: one.tokens for name, one in shares.items()})
            await asyncio.sleep(window_s)
            used = {name: one.tokens - before[name] for name, one in shares.items()}
    finally:
        await client.close()
    whole, weights = sum(used.values()), sum(_WEIGHTS.values())
    deviation = max(abs(used[name] / whole / (weight / weights) - 1) for name, weight in _WEIGHTS.items())
    return [
        Result(
            "fairness",
            f"p95 to first token beside a flood ({FLOOD} : 1), against alone",
            flooded_s / alone_s,
            "×",
            FIRST_TOKEN_LIMIT,
            detail=f"{alone_s * 1000:.0f} ms alone, {flooded_s * 1000:.0f} ms",
        ),
        Result(
            "fairness",
            "token shares, deviation from weights of 3 : 1",
            deviation,
            "",
            SHARE_LIMIT,
            detail=", ".join(f"{name} {tokens / whole:.1%}" for name, tokens in used.items()),
        ),
    ]


class _Running:
    """Tasks until the end of a block, which raises what they did."""

    def __init__(self, runs: "list[asyncio.coroutines.Coroutine[None, None, None]]") -> None:
        self._tasks = [asyncio.create_task(run) for run in runs]

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        for outcome in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome


async def _first_tokens(tenant: Tenant, window_s: float) -> float:
    """The 95th percentile, of one request at a time."""
    tenant.first_token_s.clear()
    until = time.monotonic() + window_s
    while time.monotonic() < until:
        await tenant.ask()
        await asyncio.sleep(0.1)
    return sorted(tenant.first_token_s)[int(len(tenant.first_token_s) * 0.95)]


def _make_key(target: Target, name: str, weight: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=10)
    try:
        body = json.dumps({"name": f"bench {name}", "weight": weight})
        head = {"authorization": f"Bearer {target.api_key}", "content-type": "application/json"}
        connection.request("POST", "/api/v1/keys", body, head)
        answer = connection.getresponse()
        made = json.loads(answer.read())
        if answer.status != 201:
            raise RuntimeError(f"no key could be made: {made}")
        key: str = made["secret"]
        return key
    finally:
        connection.close()
