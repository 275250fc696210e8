"""Servers of other dialects behind the gateway: clients see OpenAI's, whatever is spoken there."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from helixflow.settings.deployments import AnthropicDeployment, OllamaDeployment
from tests.harness.gateway import RunningGateway, run_gateway
from tests.harness.model_server import KEY
from tests.harness.provider_servers import AnthropicServer, OllamaServer

VARIABLE = "HELIXFLOW_TEST_PROVIDER_KEY"


@pytest.fixture(params=["anthropic", "ollama"])
async def gateway(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[RunningGateway]:
    monkeypatch.setenv(VARIABLE, KEY)
    async with AnthropicServer() as anthropic, OllamaServer() as ollama:
        deployment = {
            "anthropic": AnthropicDeployment(engine="anthropic", base_url=anthropic.base_url, api_key_env=VARIABLE),
            "ollama": OllamaDeployment(engine="ollama", base_url=ollama.base_url, api_key_env=VARIABLE),
        }[request.param]
        # An answer of the default length would not fit the toy model's context.
        deployment = deployment.model_copy(update={"max_tokens": 64} if request.param == "anthropic" else {})
        async with run_gateway(tmp_path, {"m": [deployment]}) as gateway:
            yield gateway


def body(text: str, **fields: object) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": text}], **fields}).encode()


async def test_whole_and_streamed(gateway: RunningGateway) -> None:
    whole = await gateway.chat(body("count"))
    assert whole.status == 200
    message = whole.json["choices"][0]["message"]
    assert message["content"] == "one two three four five six seven eight nine ten"
    assert whole.json["usage"] == {
        "prompt_tokens": 1,
        "completion_tokens": 10,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    streamed = await gateway.chat(body("count", stream=True, stream_options={"include_usage": True}))
    text = "".join(choice["delta"].get("content", "") for chunk in streamed.chunks for choice in chunk["choices"])
    assert text == message["content"]
    assert streamed.chunks[-1]["usage"] == whole.json["usage"]


async def test_what_it_cannot_do_is_told_by_name(gateway: RunningGateway) -> None:
    refused = await gateway.chat(body("count", n=2))
    assert refused.status == 400
    assert (refused.error["code"], refused.error["param"]) == ("unsupported_parameter", "n")


async def test_a_stream_that_breaks_off_ends_in_an_error(gateway: RunningGateway) -> None:
    answer = await gateway.chat(body("die late", stream=True))
    assert answer.status == 200
    assert "error" in json.loads(answer.events[-1])
    assert b"[DONE]" not in answer.body
