"""Names and routes as clients see them: aliases, fallbacks, residency, deployments that are too slow."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from helixflow.settings.models import ModelSettings
from helixflow.transport.testing import ScriptedUpstream, Wait, answer
from tests.harness.gateway import provider, run_gateway
from tests.harness.wire import request

WHOLE = answer(
    b'{"id":"a","object":"chat.completion","created":1,"model":"theirs","choices":[{"index":0,"message":{"role":'
    b'"assistant","content":"Hello"},"finish_reason":"stop"}],"usage":{"prompt_tokens":7,"completion_tokens":2}}',
    headers=[("content-type", "application/json")],
)
BUSY = answer(b"", status="503 Busy", headers=[("retry-after", "30")])
NOBODY = "http://127.0.0.1:9/v1"


def asking(model: str) -> bytes:
    return json.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}]}).encode()


def model(name: str, *deployments: Any, **settings: Any) -> ModelSettings:
    return ModelSettings(name=name, deployments=deployments, **settings)


async def test_an_alias_is_a_model_like_any_other_for_clients(tmp_path: Path) -> None:
    async with (
        ScriptedUpstream([[WHOLE]] * 4) as upstream,
        run_gateway(tmp_path, {"other": [provider(NOBODY)]}) as gateway,
    ):
        await gateway.gateway._models.apply(
            [model("llama-3", provider(f"{upstream.base_url}/v1"), aliases=("gpt-4", "gpt-4o")), model("other")]
        )
        listed = (await gateway.ask("GET", "/v1/models")).json["data"]
        assert [one["id"] for one in listed] == ["llama-3", "gpt-4", "gpt-4o", "other"]
        assert (await gateway.ask("GET", "/v1/models/gpt-4")).json["id"] == "gpt-4"
        got = await gateway.chat(asking("gpt-4"))
        assert got.json["model"] == "gpt-4"
        assert got.headers["x-helixflow-model"] == "llama-3"
        assert json.loads(upstream.requests[0].body)["model"] == "llama-3"
        assert (await gateway.chat(asking("llama-3"))).json["model"] == "llama-3"
        for models, allowed in (({"llama-3"}, {"llama-3", "gpt-4", "gpt-4o"}), ({"gpt-4"}, {"gpt-4"})):
            key = gateway.resolver.add("restricted", models=frozenset(models))
            async with await gateway.connect() as wire:
                listing = await wire.ask(request("GET", "/v1/models", b"", key, None))
                assert {one["id"] for one in listing.json["data"]} == allowed
                for name in ("gpt-4o", "other"):
                    got = await wire.ask(request("POST", "/v1/chat/completions", asking(name), key, None))
                    assert got.status == (200 if name in allowed else 403)


async def test_a_fallback_answers_under_the_name_that_was_asked_for(tmp_path: Path) -> None:
    async with (
        ScriptedUpstream([[BUSY]]) as busy,
        ScriptedUpstream([[WHOLE], [WHOLE]]) as spare,
        run_gateway(tmp_path, {"other": [provider(NOBODY)]}) as gateway,
    ):
        await gateway.gateway._models.apply(
            [
                model("gpt-4", provider(f"{busy.base_url}/v1"), fallbacks=("claude",)),
                model("claude", provider(f"{spare.base_url}/v1", model="claude-5")),
            ]
        )
        for _ in range(2):
            got = await gateway.chat(asking("gpt-4"))
            assert got.json["model"] == "gpt-4"
            assert got.headers["x-helixflow-deployment"] == "claude/openai-0"
        assert len(busy.requests) == 1, "it wants to be left alone for 30 s"
        assert json.loads(spare.requests[0].body)["model"] == "claude-5"


@pytest.mark.parametrize("region", ["eu", "us"])
async def test_a_request_stays_in_its_region_or_is_refused(tmp_path: Path, region: str) -> None:
    async with (
        ScriptedUpstream([[WHOLE]]) as upstream,
        run_gateway(
            tmp_path, {"m": [provider(NOBODY, tier=0), provider(f"{upstream.base_url}/v1", tier=1, region="eu")]}
        ) as gateway,
    ):
        key = gateway.resolver.add("resident", residency=region)
        async with await gateway.connect() as wire:
            got = await wire.ask(request("POST", "/v1/chat/completions", asking("m"), key, None))
        if region == "eu":
            assert got.headers["x-helixflow-deployment"] == "m/openai-1"
        else:
            assert got.status == 403
            assert "'us'" in got.error["message"]


@pytest.mark.parametrize("regions", [("eu", "us"), ("us", "eu"), ("eu", "eu")])
async def test_a_residency_that_is_said_twice_is_refused(tmp_path: Path, regions: tuple[str, str]) -> None:
    async with (
        run_gateway(tmp_path, {"m": [provider(NOBODY, region="us")]}) as gateway,
        await gateway.connect() as wire,
    ):
        headers = {"X-HelixFlow-Residency": regions[0], "x-helixflow-residency": regions[1]}
        got = await wire.ask(request("POST", "/v1/chat/completions", asking("m"), gateway.key, headers))
        assert (got.status, got.error["param"]) == (400, "x-helixflow-residency")


async def test_a_deployment_that_does_not_answer_in_time_is_not_waited_for(tmp_path: Path) -> None:
    async with (
        ScriptedUpstream([[Wait(asyncio.Event())]]) as silent,
        ScriptedUpstream([[WHOLE]]) as good,
        run_gateway(
            tmp_path,
            {
                "m": [
                    provider(f"{silent.base_url}/v1", first_byte_timeout_s=0.05),
                    provider(f"{good.base_url}/v1", tier=1),
                ]
            },
        ) as gateway,
    ):
        got = await gateway.chat(asking("m"))
        assert got.status == 200
        assert got.headers["x-helixflow-deployment"] == "m/openai-1"
