"""Answers of real engines that lose their replica: they go on from another one as if nothing had happened."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from helixflow.core.call import Call, Operation
from helixflow.core.capacity import Replica
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.principal import Principal, PrincipalKind
from helixflow.dialects.openai_chat import parse_chat
from helixflow.dialects.openai_completions import parse_completion
from helixflow.dialects.validation import decode_fields
from helixflow.engines.llama_cpp.engine import LlamaCppEngine
from helixflow.pool.manifest import StoredModel
from helixflow.transport.client import HttpClient
from tests.harness.breaking import BreakingRelay, ListedSlots
from tests.harness.engine import RunningEngine, run_engine
from tests.harness.gateway import local

# Prompts whose next token is never a near tie: engines that read the same text in other portions compute other
# roundings, and two undisturbed answers may differ then.
LIST = {"messages": [{"role": "user", "content": "List the first ten even numbers."}], "max_tokens": 24}
WEEKDAYS = {"prompt": "月火水木金土日月火水木金土日月火水", "max_tokens": 24}
TOKENS = {"prompt": [33, 216, 34, 216, 35, 216, 36, 216, 37, 216, 38, 216, 39, 216, 40, 216, 41], "max_tokens": 16}
# The ends of a text are forbidden.
WITHOUT_END = {"0": -100, "2": -100}
SETTINGS = local(context=1024, parallel=2, threads=1, prompt_cache_mib=16)


@pytest.fixture(scope="module")
def engines(chat_model: StoredModel) -> Iterator[list[RunningEngine]]:
    with run_engine(SETTINGS, chat_model.path) as one, run_engine(SETTINGS, chat_model.path) as other:
        yield [one, other]


@dataclass
class Setup:
    """Two engines, the first one behind two relays that break; and the answers of the other one, kept."""

    client: HttpClient
    relays: list[BreakingRelay]
    breaking: list[Replica]
    whole: Replica
    known: "dict[str, Outcome]"

    async def undisturbed(self, **fields: Any) -> "Outcome":
        key = repr(sorted(fields.items()))
        if key not in self.known:
            self.known[key] = await ask(self, [self.whole], **fields)
        return self.known[key]


@pytest.fixture(scope="module")
def known() -> "dict[str, Outcome]":
    return {}


@pytest.fixture
async def setup(engines: list[RunningEngine], known: "dict[str, Outcome]") -> AsyncIterator[Setup]:
    one, other = (engine.replica for engine in engines)
    relays = [BreakingRelay(one), BreakingRelay(one)]
    client = HttpClient()
    async with relays[0].serve(), relays[1].serve():
        breaking = [replace(one, replica_id=f"breaking-{n}", port=relay.port) for n, relay in enumerate(relays)]
        yield Setup(client, relays, breaking, replace(other, replica_id="whole"), known)
    await client.close()


@dataclass
class Outcome:
    """What a client got, and what is known of it here."""

    body: bytes
    call: Call
    slots: ListedSlots

    @property
    def chunks(self) -> list[Any]:
        return [json.loads(line[6:]) for line in self.body.split(b"\n") if line.startswith(b"data: {")]

    @property
    def choices(self) -> list[Any]:
        return [choice for chunk in self.chunks for choice in chunk["choices"]]

    @property
    def text(self) -> str:
        return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in self.choices)

    @property
    def usage(self) -> tuple[int, int]:
        usage = self.call.progress.usage
        assert usage.reported
        return usage.prompt_tokens, usage.completion_tokens


async def ask(setup: Setup, replicas: Sequence[Replica], **fields: Any) -> Outcome:
    """Raises `HelixError` as the answer does, with what came before in its notes."""
    operation = Operation.CHAT if "messages" in fields else Operation.COMPLETIONS
    body = json.dumps({"model": "m", "temperature": 0, "stream": True, **fields}).encode()
    params = (parse_chat if operation is Operation.CHAT else parse_completion)(body)
    principal = Principal(PrincipalKind.KEY, "key", "key", "organisation", "project")
    stream, deadline = bool(params.stream), asyncio.get_running_loop().time() + 240
    call = Call("c", "r", principal, operation, "m", decode_fields(body), params, stream, False, deadline)
    slots = ListedSlots(replicas)
    engine = LlamaCppEngine(setup.client, slots, deployment="m/llama_cpp-0", task="chat")
    answer = await engine.open(call)
    outcome = Outcome(b"", call, slots)
    try:
        while piece := await answer.read():
            outcome.body += piece
    except HelixError as exc:
        exc.add_note(outcome.text)
        raise
    finally:
        answer.close()
        assert all(lease.released for lease in slots.leases)
    return outcome


@pytest.mark.parametrize(
    ("fields", "events"),
    [(LIST, 1), (LIST, 11), (LIST, 23), (WEEKDAYS, 1), (WEEKDAYS, 8), (TOKENS, 5)],
    ids=["chat-1", "chat-11", "chat-23", "weekdays-1", "weekdays-8", "token-ids"],
)
async def test_a_lost_replica_is_not_noticed(setup: Setup, fields: dict[str, Any], events: int) -> None:
    undisturbed = await setup.undisturbed(**fields)
    pieces = sum(bool(choice.get("text") or choice.get("delta", {}).get("content")) for choice in undisturbed.choices)
    setup.relays[0].break_after(min(events, pieces - 1))
    resumed = await ask(setup, [setup.breaking[0], setup.whole], **fields)
    assert setup.relays[0].broken == 1
    assert resumed.text == undisturbed.text
    assert resumed.usage == undisturbed.usage
    assert len({chunk["id"] for chunk in resumed.chunks}) == 1
    assert [c["finish_reason"] for c in resumed.choices if c["finish_reason"]] == ["length"]
    assert resumed.body.endswith(b"\n\n: helixflow-resumed 1\n\ndata: [DONE]\n\n")
    assert b"helixflow-resumed" not in undisturbed.body
    assert resumed.call.progress.resumed == 1
    lost, successor = resumed.slots.leases
    assert (lost.failed, successor.failed) == (True, False)
    assert resumed.slots.avoided == [frozenset(), {"breaking-0"}]


async def test_several_deaths_in_a_row(setup: Setup) -> None:
    undisturbed = await setup.undisturbed(**LIST)
    for relay in setup.relays:
        relay.break_after(6)
    resumed = await ask(setup, [*setup.breaking, setup.whole], **LIST)
    assert (resumed.text, resumed.usage) == (undisturbed.text, undisturbed.usage)
    assert b": helixflow-resumed 2\n\n" in resumed.body


@pytest.mark.parametrize("events", [3, 9])
async def test_a_stop_string_beyond_the_seam_is_found(setup: Setup, events: int) -> None:
    stop = "4. 4"
    undisturbed = await setup.undisturbed(**LIST)
    cut = await setup.undisturbed(**LIST, stop=stop)
    setup.relays[0].break_after(events)
    resumed = await ask(setup, [setup.breaking[0], setup.whole], **LIST, stop=stop)
    assert undisturbed.text.startswith(resumed.text)
    assert (resumed.text, resumed.usage) == (cut.text, cut.usage)
    assert stop not in resumed.text
    assert [c["finish_reason"] for c in resumed.choices if c["finish_reason"]] == ["stop"]


async def test_answers_that_are_no_streams_go_on_too(setup: Setup) -> None:
    undisturbed = json.loads((await setup.undisturbed(**LIST, stream=False)).body)
    setup.relays[0].break_after(10)
    resumed = await ask(setup, [setup.breaking[0], setup.whole], **LIST, stream=False)
    assert resumed.call.progress.resumed == 1
    answer = json.loads(resumed.body)
    assert answer["choices"] == undisturbed["choices"]
    assert answer["usage"]["completion_tokens"] == undisturbed["usage"]["completion_tokens"] == 24


async def test_each_of_many_choices_goes_on_for_itself(setup: Setup) -> None:
    setup.relays[0].break_after(5, times=2)
    fields = {**LIST, "n": 2, "temperature": 0.8, "seed": 7, "frequency_penalty": 0.5}
    fields |= {"max_tokens": 12, "logit_bias": WITHOUT_END}
    resumed = await ask(setup, [setup.breaking[0], setup.whole], **fields)
    assert resumed.call.progress.resumed == 2
    assert sorted(c["index"] for c in resumed.choices if c["finish_reason"]) == [0, 1]
    assert resumed.usage[1] == 24


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"logprobs": True},
    ],
    ids=["schema", "tools", "logprobs"],
)
async def test_what_is_no_plain_text_ends_in_an_error(setup: Setup, fields: dict[str, Any]) -> None:
    setup.relays[0].break_after(1)
    with pytest.raises(HelixError) as caught:
        await ask(setup, [setup.breaking[0], setup.whole], **LIST, **fields)
    assert caught.value.kind is ErrorKind.UPSTREAM_UNAVAILABLE


async def test_a_replica_without_another_one_is_asked_again(setup: Setup) -> None:
    """It may be back, or a connection was all that was lost."""
    undisturbed = await setup.undisturbed(**LIST)
    setup.relays[0].break_after(4)
    resumed = await ask(setup, [setup.breaking[0]], **LIST)
    assert (resumed.text, resumed.usage) == (undisturbed.text, undisturbed.usage)


async def test_a_request_that_kills_every_replica_comes_to_an_end(setup: Setup) -> None:
    setup.relays[0].break_after(1, times=1000)
    replicas = [replace(setup.breaking[0], replica_id=f"breaking-{n}") for n in range(20)]
    with pytest.raises(HelixError) as caught:
        await ask(setup, replicas, **LIST)
    assert caught.value.kind is ErrorKind.UPSTREAM_UNAVAILABLE
    assert setup.relays[0].broken == 9
    assert caught.value.__notes__ != [""]


async def test_kill_9(setup: Setup, chat_model: StoredModel) -> None:
    longer = {**LIST, "max_tokens": 48, "logit_bias": WITHOUT_END}
    undisturbed = await setup.undisturbed(**longer)
    with run_engine(SETTINGS, chat_model.path) as doomed:
        replica = replace(doomed.replica, replica_id="doomed")
        task = asyncio.create_task(ask(setup, [replica, setup.whole], **longer))
        while not await asyncio.to_thread(doomed.metric, "llamacpp:prompt_tokens_total"):
            pass
        doomed.process.kill()
        resumed = await task
    assert resumed.call.progress.resumed == 1
    assert (resumed.text, resumed.usage) == (undisturbed.text, undisturbed.usage)
