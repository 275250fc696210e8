"""From the answer to a revocation until the gateway refuses the key; and what sign-ins do to others' answers."""

import asyncio
import http.client
import json
import time
from typing import Any

import uvloop

from benchmarks import targets
from benchmarks.load import http_request, measure_latency, percentile
from benchmarks.report import Options, Result, median, number, spread

LIMIT_S = 1.0
RATE = 500.0
SIGN_INS_A_SECOND = 10.0
P99_RATIO = 1.10
_EMAIL, _PASSWORD = "bench@example.com", "four words in a row"


def run(options: Options) -> list[Result]:
    with targets.mock() as mock, targets.gateway(mock) as gateway:
        return [_revocations(gateway, options), *_sign_ins(gateway, options)]


def _revocations(gateway: targets.Target, options: Options) -> Result:
    times = []
    for turn in range(4 * options.rounds):
        made = _ask(gateway, "POST", "/api/v1/keys", {"name": f"bench {turn}"}, gateway.api_key)
        identifier, secret = made["key"]["id"], made["secret"]
        if _status(gateway, secret) != 200:
            raise RuntimeError("a new key does not work")
        _ask(gateway, "POST", f"/api/v1/keys/{identifier}/revoke", None, gateway.api_key)
        revoked = time.perf_counter()
        while _status(gateway, secret) != 401:
            if time.perf_counter() - revoked > 10:
                raise RuntimeError("a revoked key goes on working")
        times.append(time.perf_counter() - revoked)
    detail = f"p50 {number(median(times) * 1e3)} ms, of {len(times)}"
    return Result("administration", "a revoked key is refused, worst", max(times), "s", LIMIT_S, detail=detail)


def _sign_ins(gateway: targets.Target, options: Options) -> list[Result]:
    _ask(
        gateway,
        "POST",
        "/api/v1/users",
        {"email": _EMAIL, "name": "Bench", "role": "developer", "password": _PASSWORD},
        gateway.api_key,
    )
    _ask(gateway, "POST", "/api/v1/auth/login", {"email": _EMAIL, "password": _PASSWORD})
    seconds = 4.0 if options.quick else 10.0
    request = http_request(gateway.port, gateway.chat_body(), gateway.api_key)
    ratios, rates = [], []

    async def measure() -> None:
        for turn in range(options.rounds + 1):
            quiet = await measure_latency(gateway.port, request, RATE, seconds)
            stop = asyncio.Event()
            signing_in = asyncio.create_task(_keep_signing_in(gateway, stop))
            busy = await measure_latency(gateway.port, request, RATE, seconds)
            stop.set()
            done = await signing_in
            if quiet.errors or busy.errors:
                raise RuntimeError(f"{quiet.errors + busy.errors} errors: {quiet.problem or busy.problem}")
            if turn:  # the first one warms up
                ratios.append(percentile(busy.latencies_s, 0.99) / percentile(quiet.latencies_s, 0.99))
                rates.append(done / seconds)

    uvloop.run(measure())
    return [
        Result("administration", "sign-ins a second beside it", median(rates), "/s", detail=spread(rates)),
        Result("administration", "p99 at 500/s beside sign-ins", median(ratios), "×", P99_RATIO, detail=spread(ratios)),
    ]


async def _keep_signing_in(gateway: targets.Target, stop: asyncio.Event) -> int:
    """Signs in at a fixed rate until told to stop; how many succeeded."""
    done, pending = 0, set()
    due = time.perf_counter()
    while not stop.is_set():
        pending.add(asyncio.create_task(asyncio.to_thread(_sign_in, gateway)))
        due += 1 / SIGN_INS_A_SECOND
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        for task in [task for task in pending if task.done()]:
            pending.discard(task)
            done += task.result()
    return done + sum(await asyncio.gather(*pending))


def _sign_in(gateway: targets.Target) -> bool:
    body = {"email": _EMAIL, "password": _PASSWORD}
    return "access_token" in _ask(gateway, "POST", "/api/v1/auth/login", body, refused=(429,))


def _ask(
    gateway: targets.Target,
    method: str,
    path: str,
    body: dict[str, Any] | None = None,
    key: str = "",
    refused: tuple[int, ...] = (),
) -> dict[str, Any]:
    """The answer's JSON. Raises `RuntimeError` for a status of 400 and above that is not one of `refused`."""
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=30)
    try:
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        text = response.read()
        if response.status >= 400 and response.status not in refused:
            raise RuntimeError(f"{method} {path}: {response.status} {text[:300]!r}")
        answer: dict[str, Any] = json.loads(text or b"{}")
        return answer
    finally:
        connection.close()


def _status(gateway: targets.Target, key: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=5)
    try:
        connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
        return connection.getresponse().status
    finally:
        connection.close()
