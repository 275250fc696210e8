"""Limits, budgets and the ledger around a real model, as a team meets them."""

import asyncio
from typing import Any

import openai
import pytest

from tests.harness.node import CHAT, CHAT_MODEL, WAIT_S, Node
from tests.harness.visitor import Visitor, visit


def client_of(node: Node, key: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{node.port}/v1", api_key=key, max_retries=0)


async def say(client: openai.AsyncOpenAI, text: str = "Say hello.", **fields: Any) -> Any:
    messages: Any = [{"role": "user", "content": text}]
    return await client.chat.completions.create(
        **{"model": CHAT_MODEL, "messages": messages, "max_tokens": 4, "temperature": 0, **fields}
    )


async def is_served(client: openai.AsyncOpenAI) -> bool:
    """Whether there is budget for a short answer."""
    try:
        await say(client)
    except openai.RateLimitError:
        return False
    return True


async def recorded(operator: Visitor, request_id: str) -> dict[str, Any]:
    """A request as the ledger has it, a moment after its end."""
    async with asyncio.timeout(WAIT_S):
        while (answer := await operator.admin("GET", f"/requests/{request_id}")).status_code != 200:
            await asyncio.sleep(0.05)
    found: dict[str, Any] = answer.json()
    return found


async def test_what_an_answer_used_is_in_the_ledger(node: Node) -> None:
    async with visit(node) as operator, client_of(node, node.key) as client:
        answer = await say(client, metadata={"team": "search"})
        row = await recorded(operator, answer._request_id)
        explained = (await operator.admin("GET", f"/requests/{answer._request_id}/explain")).json()
        usage = (await operator.admin("GET", "/usage?group_by=tag:team")).json()
    assert (row["prompt_tokens"], row["completion_tokens"]) == (answer.usage.prompt_tokens, 4)
    assert (row["outcome"], row["estimated"], row["tags"]) == ("completed", False, {"team": "search"})
    assert 0 <= row["queue_ms"] <= row["first_token_ms"] <= row["duration_ms"]
    assert explained["authorised"]["by"] == "key"
    assert explained["routed"]["deployment"] == f"{CHAT_MODEL}/llama_cpp-0"
    assert [row["group"] for row in usage["data"]] == [{"tag:team": "search"}]


async def test_a_client_that_leaves_pays_for_what_was_made(node: Node) -> None:
    async with visit(node) as operator:
        headers = {"authorization": f"Bearer {node.key}", "x-request-id": "leaves-mid-answer"}
        body = {
            "model": CHAT_MODEL,
            "messages": [{"role": "user", "content": "Count from one to one thousand."}],
            "stream": True,
            "max_tokens": 2000,
            "temperature": 0,
            "logit_bias": {"2": -100},
        }
        async with operator.client.stream("POST", CHAT, json=body, headers=headers) as answer:
            async for line in answer.aiter_lines():
                if '"content":"' in line and '"content":""' not in line:
                    break
        row = await recorded(operator, "leaves-mid-answer")
    assert (row["outcome"], row["status"], row["estimated"]) == ("cancelled", 499, True)
    assert row["prompt_tokens"] > 20
    assert 1 <= row["completion_tokens"] < 2000


async def test_a_limit_is_told_and_kept(node: Node) -> None:
    async with visit(node) as operator:
        made = await operator.make("/keys", {"name": "limited"})
        limit = {"scope": "key", "subject_id": made["key"]["id"], "metric": "requests_per_minute", "value": 2}
        await operator.make("/limits", limit)
        async with client_of(node, made["secret"]) as client:
            for left in ("1", "0"):
                answer = await client.chat.completions.with_raw_response.create(
                    model=CHAT_MODEL, messages=[{"role": "user", "content": "Hi."}], max_tokens=2
                )
                assert answer.headers["x-ratelimit-limit-requests"] == "2"
                assert answer.headers["x-ratelimit-remaining-requests"] == left
            with pytest.raises(openai.RateLimitError) as caught:
                await say(client)
    assert caught.value.code == "rate_limit_exceeded"
    assert "requests per minute of this API key: limit 2" in caught.value.message
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 30


async def test_a_budget_is_kept_and_can_be_raised(node: Node) -> None:
    async with visit(node) as operator:
        made = await operator.make("/keys", {"name": "budgeted"})
        budget = {"scope": "key", "subject_id": made["key"]["id"], "unit": "tokens", "period": "total", "cap": "300"}
        kept = await operator.make("/budgets", budget)
        async with client_of(node, made["secret"]) as client:
            await say(client)
            with pytest.raises(openai.RateLimitError) as caught:
                for _ in range(40):
                    await say(client, max_tokens=20)
            assert caught.value.code == "insufficient_quota"
            await operator.do("PATCH", f"/budgets/{kept['id']}", {"cap": "100000"})
            async with asyncio.timeout(WAIT_S):
                while not await is_served(client):
                    await asyncio.sleep(0.01)
        spent = 0
        async with asyncio.timeout(WAIT_S):
            while not spent:
                spent = int((await operator.admin("GET", f"/budgets/{kept['id']}")).json()["spent"])
    assert 0 < spent <= 100_000


async def test_a_tag_over_its_size_names_its_field(node: Node) -> None:
    async with client_of(node, node.key) as client:
        for metadata in ({"k" * 65: "x"}, {"k": "x" * 513}, {str(n): "x" for n in range(17)}):
            with pytest.raises(openai.BadRequestError) as caught:
                await say(client, metadata=metadata)
            assert caught.value.param == "metadata"
