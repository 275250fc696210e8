"""Many streams of 50 events/s: the longest stall at 500, and how many fit before they stall."""

import asyncio

import uvloop

from benchmarks import targets
from benchmarks.load import Load, http_request
from benchmarks.processes import cpu_seconds
from benchmarks.report import Options, Result, median
from benchmarks.targets import Target

STREAMS = 500
STALL_LIMIT_MS = 100.0
EVENTS_A_SECOND = 50
_SATURATION_STEPS = range(600, 1601, 100)
# Events of one answer: long enough that few streams begin and end within a window.
_EVENTS = 1000


def run(options: Options) -> list[Result]:
    seconds = 5.0 if options.quick else 15.0
    results = []
    with targets.mock() as mock, targets.bare(mock) as bare, targets.gateway(mock) as gateway:
        stalls: dict[str, list[float]] = {}
        shares: dict[str, list[float]] = {}
        for _ in range(1 if options.quick else 3):
            for target in (mock, bare, gateway):
                stall_ms, rate, share = uvloop.run(_watch(target, STREAMS, seconds))
                stalls.setdefault(target.name, []).append(stall_ms)
                shares.setdefault(target.name, []).append(share)
                if rate < 0.97:
                    stalls[target.name].append(1e3)  # events that do not keep pace are a stall without end
        beside = ", ".join(f"{name} {median(values):.0f} ms" for name, values in stalls.items() if name != "helixflow")
        results.append(
            Result(
                "paced_streams",
                "longest stall at 500",
                median(stalls["helixflow"]),
                "ms",
                STALL_LIMIT_MS,
                detail=beside,
            )
        )
        for target in (bare, gateway):
            share = median(shares[target.name])
            results.append(Result("paced_streams", f"core used at 500: {target.name}", share * 100, "%"))
        if not options.quick:
            for target in (bare, gateway):
                fits, why = _saturate(target)
                results.append(Result("paced_streams", f"streams before stalls: {target.name}", fits, "", detail=why))
    return results


def _saturate(target: Target) -> tuple[int, str]:
    fits = STREAMS
    for streams in _SATURATION_STEPS:
        stall_ms, rate, share = uvloop.run(_watch(target, streams, 4.0))
        if stall_ms > STALL_LIMIT_MS or rate < 0.97:
            return fits, f"at {streams}: longest stall {stall_ms:.0f} ms, {rate:.0%} of the pace, {share:.0%} of a core"
        fits = streams
    return fits, "the mock and the load allow no more"


async def _watch(target: Target, streams: int, seconds: float) -> tuple[float, float, float]:
    """The longest stall in milliseconds, the share of the events that came in time, and the share of a core used."""
    body = target.chat_body("paced", stream=True, max_tokens=_EVENTS)
    async with Load(target.port, http_request(target.port, body, target.api_key), streams, watch_gaps=True) as load:
        await asyncio.sleep(1.5)
        load.tally.reset()
        cpu = cpu_seconds(target.pid)
        await asyncio.sleep(seconds)
        if load.tally.errors:
            raise RuntimeError(f"{target.name}: {load.tally.errors} errors: {load.tally.problem}")
        rate = load.tally.events / (streams * EVENTS_A_SECOND * seconds)
        share = (cpu_seconds(target.pid) - cpu) / seconds
        return load.tally.longest_gap_s * 1e3, rate, share
