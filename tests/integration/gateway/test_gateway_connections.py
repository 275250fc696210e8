"""Several requests on one connection: each is judged by itself, and answered in its turn."""

from helixflow.core.keys import generate_key
from tests.harness.gateway import RunningGateway
from tests.harness.wire import request

UNKNOWN = b'{"model":"unknown","messages":[{"role":"user","content":"Hi"}]}'


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
