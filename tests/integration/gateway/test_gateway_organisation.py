"""OpenAI's endpoints for an organisation go to the admin API; the gateway's own errors there are in OpenAI's form."""

from pathlib import Path

import pytest

from helixflow.gateway.surfaces.control_plane import has_problems, is_control_plane
from helixflow.transport.testing import Close, ScriptedUpstream, Send, answer, chunk
from tests.harness.gateway import provider, run_gateway
from tests.harness.wire import request

PATH = "/v1/organization/usage/completions?start_time=1&group_by[]=model"


async def test_a_request_goes_through_and_its_answer_comes_back(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    async with (
        ScriptedUpstream([[answer(b'{"object":"page"}')]], path=tmp_path / "run" / "admin.sock") as admin,
        run_gateway(tmp_path, {"m": [provider("http://127.0.0.1:9")]}) as gateway,
        await gateway.connect() as wire,
    ):
        got = await wire.ask(request("GET", PATH, headers={"authorization": "Bearer hfk_x"}))
    assert (got.status, got.body) == (200, b'{"object":"page"}')
    assert (admin.requests[0].target, admin.requests[0].headers["authorization"]) == (PATH, "Bearer hfk_x")


async def test_errors_of_the_gateway_itself_have_the_form_of_openais(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    async with (
        run_gateway(tmp_path, {"m": [provider("http://127.0.0.1:9")]}) as gateway,
        await gateway.connect() as wire,
    ):
        away = await wire.ask(request("GET", PATH))
    assert (away.status, away.headers["content-type"]) == (503, "application/json")
    assert away.json["error"]["code"] == "service_unavailable"


async def test_an_answer_that_breaks_off_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    script = [Send(head), Send(chunk(b'{"object":')), Close()]
    async with (
        ScriptedUpstream([script], path=tmp_path / "run" / "admin.sock"),
        run_gateway(tmp_path, {"m": [provider("http://127.0.0.1:9")]}) as gateway,
        await gateway.connect() as wire,
    ):
        got = await wire.ask(request("GET", PATH))
    assert got.body == b'{"object":', "and no event of a stream after it"
    assert not got.complete


@pytest.mark.parametrize(
    ("path", "forwarded", "problems"),
    [
        ("/v1/organization/costs", True, False),
        ("/v1/organization/", True, False),
        ("/v1/organization", False, False),
        ("/v1/organizations/x", False, False),
        ("/api/v1/usage", True, True),
        ("/api/v1", True, True),
        ("/api/v1x", False, False),
    ],
)
def test_which_paths_are_the_control_planes(path: str, forwarded: bool, problems: bool) -> None:
    assert (is_control_plane(path), has_problems(path)) == (forwarded, problems)
