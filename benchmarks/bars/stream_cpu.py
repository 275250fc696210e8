"""Streams of 34 events, unpaced, on 32 connections: CPU a stream against the bare app's."""

from benchmarks import targets
from benchmarks.bars.turns import measure_in_turns
from benchmarks.report import Options, Result, median, spread

LIMIT = 1.35


def run(options: Options) -> list[Result]:
    with targets.mock() as mock, targets.bare(mock) as bare, targets.gateway(mock) as gateway:
        turns = measure_in_turns([bare, gateway], options, stream=True)
    ours, theirs = turns["helixflow"], turns["bare"]
    ratio = median(ours.cpu_us) / median(theirs.cpu_us)
    return [
        Result("stream_cpu", "CPU against bare app", ratio, "×", LIMIT, detail=f"bare {theirs.summary}"),
        Result("stream_cpu", "CPU a stream", median(ours.cpu_us), "µs", detail=spread(ours.cpu_us)),
        Result("stream_cpu", "streams a second", median(ours.rate), "/s", detail=spread(ours.rate)),
    ]
