"""Several requests on one connection: each is judged by itself, and answered in its turn."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from helixflow.core.keys import generate_key
from tests.harness.gateway import RunningGateway, run_gateway
from tests.harness.wire import request

UNKNOWN = b'{"model":"unknown","messages":[{"role":"user","content":"Hi"}]}'

MAX_HEAD = 8192
UNFINISHED = b"GET /livez HTTP/1.1\r\nhost: test\r\nx-long: " + b"x" * (2 * MAX_HEAD)
BODIES = {
    "none": request("GET", "/version"),
    "plain": request("POST", "/v1/chat/completions", b"x" * (2 * MAX_HEAD)),
    "with empty lines": request("POST", "/v1/chat/completions", b"x\r\n\r\n\n\n" * 2000),
    "chunked": b"POST /v1/embeddings HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n"
    + b"1000\r\n%s\r\n" % (b"y" * 4096) * 4
    + b"0\r\n\r\n",
}


@pytest.fixture
async def patient_gateway(tmp_path: Path) -> AsyncIterator[RunningGateway]:
    """Waits for a head for longer than any test."""
    async with run_gateway(tmp_path, {}, max_header_bytes=MAX_HEAD, header_timeout_s=600) as gateway:
        yield gateway


async def test_a_connection_that_changes_its_key_is_identified_anew(idle_gateway: RunningGateway) -> None:
    async with await idle_gateway.connect() as wire:
        for key, code in (
            (idle_gateway.key, "model_not_found"),
            (generate_key(), "invalid_api_key"),
            (idle_gateway.key, "model_not_found"),
        ):
            got = await wire.ask(request("POST", "/v1/chat/completions", UNKNOWN, key))
            assert got.error["code"] == code


async def test_pipelined_requests_are_answered_in_order(idle_gateway: RunningGateway) -> None:
    async with await idle_gateway.connect() as wire:
        wire.send(request("GET", "/livez") + request("GET", "/nowhere") + request("GET", "/version"))
        assert [(await wire.read()).status for _ in range(3)] == [200, 404, 200]


@pytest.mark.parametrize("secure", [False, True])
async def test_a_head_that_is_too_large_is_refused_though_its_end_has_not_come(
    patient_gateway: RunningGateway, secure: bool
) -> None:
    connect = patient_gateway.connect_tls if secure else patient_gateway.connect
    async with await connect() as wire:
        assert (await wire.ask(UNFINISHED)).status == 431
        assert await wire.closed() == b""


async def test_so_is_one_that_comes_behind_other_requests(patient_gateway: RunningGateway) -> None:
    async with await patient_gateway.connect() as wire:
        assert (await wire.ask(request("GET", "/livez"))).status == 200
        assert (await wire.ask(UNFINISHED)).status == 431


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("first", BODIES.values(), ids=BODIES.keys())
async def test_what_came_before_a_head_in_the_same_piece_is_not_counted(
    patient_gateway: RunningGateway, first: bytes, secure: bool
) -> None:
    connect = patient_gateway.connect_tls if secure else patient_gateway.connect
    second = request("GET", "/livez", headers={"x-long": "x" * (MAX_HEAD - 200)})
    async with await connect() as wire:
        wire.send(first * 3 + second[:-3])
        first_statuses = [(await wire.read()).status for _ in range(3)]
        assert 431 not in first_statuses
        wire.send(second[-3:])
        assert (await wire.read()).status == 200
