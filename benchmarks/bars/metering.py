"""The whole path with limits, budgets and journal on, beside the same gateway without metering and the bare app."""

import http.client
import json
from collections.abc import Mapping
from typing import Any

from benchmarks import targets
from benchmarks.bars.turns import measure_in_turns
from benchmarks.report import Options, Result, median, spread

RATE_RATIO = 0.85
CPU_RATIO = 1.6
# So high that nothing is refused; each is checked for each request all the same.
_LIMITS: tuple[Mapping[str, Any], ...] = (
    {"scope": "organisation", "metric": "requests_per_minute", "value": 10**9},
    {"scope": "organisation", "metric": "tokens_per_minute", "value": 10**12},
    {"scope": "organisation", "metric": "parallel_requests", "value": 10**6},
)
_BUDGET: Mapping[str, Any] = {"scope": "organisation", "unit": "money", "period": "month", "cap": "1000000"}


def run(options: Options) -> list[Result]:
    with (
        targets.mock() as mock,
        targets.bare(mock) as bare,
        targets.gateway(mock, name="unmetered") as unmetered,
        targets.gateway(mock, metered=True, name="metered") as metered,
    ):
        for limit in _LIMITS:
            _post(metered, "/api/v1/limits", limit)
        _post(metered, "/api/v1/budgets", _BUDGET)
        whole = measure_in_turns([bare, unmetered, metered], options, max_tokens=16)
        streams = measure_in_turns([bare, unmetered, metered], options, stream=True, max_tokens=31)
    results = []
    for kind, turns in (("request", whole), ("stream", streams)):
        rates = [ours / theirs for ours, theirs in zip(turns["metered"].rate, turns["unmetered"].rate, strict=True)]
        cpu = median(turns["metered"].cpu_us) / median(turns["bare"].cpu_us)
        results += [
            Result("metering", f"{kind}s/s against metering off", median(rates), "×", RATE_RATIO, True, spread(rates)),
            Result(
                "metering",
                f"CPU a {kind} against bare app",
                cpu,
                "×",
                CPU_RATIO,
                detail="; ".join(f"{name} {turn.summary}" for name, turn in turns.items()),
            ),
        ]
    return results


def _post(target: targets.Target, path: str, body: Mapping[str, Any]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=10)
    headers = {"authorization": f"Bearer {target.api_key}", "content-type": "application/json"}
    try:
        connection.request("POST", path, json.dumps(body), headers)
        answer = connection.getresponse()
        text = answer.read().decode()
    finally:
        connection.close()
    if answer.status != 201:
        raise RuntimeError(f"{path}: {answer.status} {text}")
