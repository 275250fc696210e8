"""500 requests/s through the gateway against the same straight to the mock, in turns."""

import uvloop

from benchmarks import targets
from benchmarks.load import http_request, measure_latency, percentile
from benchmarks.report import Options, Result, median, spread

RATE = 500.0
P50_LIMIT_MS = 0.35
P99_LIMIT_MS = 1.5


def run(options: Options) -> list[Result]:
    seconds = 4.0 if options.quick else 10.0
    shares = {"p50": 0.50, "p99": 0.99}
    seen: dict[tuple[str, str], list[float]] = {}
    with targets.mock() as mock, targets.gateway(mock) as gateway:

        async def measure() -> None:
            for turn in range(options.rounds + 1):
                for target in (mock, gateway):
                    request = http_request(target.port, target.chat_body(), target.api_key)
                    tally = await measure_latency(target.port, request, RATE, seconds if turn else 1.0)
                    if tally.errors:
                        raise RuntimeError(f"{target.name}: {tally.errors} errors: {tally.problem}")
                    for name, share in shares.items():
                        if turn:  # the first one warms up
                            seen.setdefault((target.name, name), []).append(percentile(tally.latencies_s, share) * 1e3)

        uvloop.run(measure())
    results = []
    for name, limit in (("p50", P50_LIMIT_MS), ("p99", P99_LIMIT_MS)):
        direct, through = seen["mock", name], seen["helixflow", name]
        added = [b - a for a, b in zip(direct, through, strict=True)]
        detail = f"direct {median(direct):.2f}, through {median(through):.2f}; {spread(added)}"
        results.append(Result("added_latency", f"added {name} at 500/s", median(added), "ms", limit, detail=detail))
    return results
