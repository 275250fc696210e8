"""CPU per answer of several servers, measured in turns so that the machine's noise hits all alike."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import uvloop

from benchmarks.load import Load, http_request
from benchmarks.processes import cpu_seconds
from benchmarks.report import Options, median
from benchmarks.targets import Target

CONNECTIONS = 32


@dataclass(slots=True)
class Turns:
    """Of one server: microseconds of CPU an answer, and answers a second, one value a round."""

    cpu_us: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)

    @property
    def summary(self) -> str:
        return f"{median(self.cpu_us):.0f} µs, {median(self.rate):.0f}/s"


def measure_in_turns(targets: Sequence[Target], options: Options, **fields: Any) -> dict[str, Turns]:
    """Loads each target for one window a round. `fields` go into the request. Raises `RuntimeError` on any error."""
    turns = {target.name: Turns() for target in targets}

    async def run() -> None:
        for _ in range(options.rounds):
            for target in targets:
                cpu_us, rate = await _measure(target, options, target.chat_body(**fields))
                turns[target.name].cpu_us.append(cpu_us)
                turns[target.name].rate.append(rate)

    uvloop.run(run())
    return turns


async def _measure(target: Target, options: Options, body: bytes) -> tuple[float, float]:
    async with Load(target.port, http_request(target.port, body, target.api_key), CONNECTIONS) as load:
        await asyncio.sleep(options.warm_up_s)
        answers, cpu, started = load.tally.answers, cpu_seconds(target.pid), time.perf_counter()
        await asyncio.sleep(options.window_s)
        answers, cpu = load.tally.answers - answers, cpu_seconds(target.pid) - cpu
        elapsed = time.perf_counter() - started
        if load.tally.errors or not answers:
            raise RuntimeError(f"{target.name}: {load.tally.errors} errors, {answers} answers: {load.tally.problem}")
    return cpu / answers * 1e6, answers / elapsed
