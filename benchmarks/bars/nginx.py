"""nginx `proxy_pass` on the same loads: reported beside the gateway, no bar."""

from benchmarks import targets
from benchmarks.bars.turns import measure_in_turns
from benchmarks.report import Options, Result, median, spread


def run(options: Options) -> list[Result]:
    results = []
    with targets.mock() as mock, targets.nginx(mock) as nginx:
        if nginx is None:
            return [Result("nginx", "not installed", 0, "", detail="apt-get install nginx-light to compare")]
        for metric, stream in (("request", False), ("stream", True)):
            turns = measure_in_turns([nginx], options, stream=stream)["nginx"]
            results.append(Result("nginx", f"CPU a {metric}", median(turns.cpu_us), "µs", detail=spread(turns.cpu_us)))
            results.append(Result("nginx", f"{metric}s a second", median(turns.rate), "/s", detail=spread(turns.rate)))
    return results
