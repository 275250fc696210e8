"""Models that change while a node serves: by the API, by the command line, by editing the file; and back again."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from helixflow.launch.serving_cache import ServingCache, digest_of, write_cache
from helixflow.pool.manifest import StoredModel
from helixflow.settings.configuration import document_of, read_document
from helixflow.settings.load import load_settings
from helixflow.transport.testing import LAST_CHUNK, ScriptedUpstream, Send, Wait, answer, chunk
from tests.harness.node import CHAT_MODEL, WAIT_S, Node, eventually, fill_store, run_node, until
from tests.harness.wire import Answer, Wire, request

PIECE = (
    b'data: {"id":"a","object":"chat.completion.chunk","created":1,"model":"x","choices":[{"index":0,'
    b'"delta":{"content":"%b"},"finish_reason":%b}]}\n\n'
)
WHOLE = answer(
    b'{"id":"a","object":"chat.completion","created":1,"model":"x","choices":[{"index":0,"message":{"role":"assistant",'
    b'"content":"Hello"},"finish_reason":"stop"}],"usage":{"prompt_tokens":7,"completion_tokens":2}}',
    headers=[("content-type", "application/json")],
)


def toml(*names: str, base_url: str = "http://127.0.0.1:9/v1", more: str = "") -> str:
    return more + "".join(
        f'[[models]]\nname = "{name}"\n[[models.deployments]]\nengine = "openai"\nbase_url = "{base_url}"\n'
        for name in names
    )


def served_by(base_url: str, **settings: Any) -> dict[str, Any]:
    return {"engine": "openai", "base_url": f"{base_url}/v1", **settings}


LOCAL = '[[models]]\nname = "local"\n[[models.deployments]]\nengine = "llama_cpp"\nsource = "file:%s"\n'


class Served:
    """A node that follows `file`."""

    def __init__(self, node: Node, file: Path) -> None:
        self.node = node
        self.file = file

    async def ask(self, verb: str, path: str, body: Any = None) -> Answer:
        content = msgspec.json.encode(body) if body is not None else None
        headers = {"content-type": "application/json"} if body is not None else None
        async with await self.node.connect() as wire:
            return await wire.ask(request(verb, f"/api/v1{path}", content, self.node.key, headers))

    async def apply(self, **models: list[dict[str, Any]]) -> int:
        """Through the API; the version that it becomes."""
        body = {"models": [{"name": name, "deployments": some} for name, some in models.items()]}
        applied = await self.ask("PUT", "/configuration", body)
        assert applied.status == 200, applied.body
        await self.wait_for(*models)
        return int(applied.json["version"])

    async def names(self) -> set[str]:
        return {model["id"] for model in (await self.node.ask("GET", "/v1/models")).json["data"]}

    async def wait_for(self, *names: str) -> None:
        async with asyncio.timeout(WAIT_S):
            while await self.names() != set(names):
                await asyncio.sleep(0.02)

    async def chat(self, model: str) -> Answer:
        return await self.node.chat(model=model)

    async def run(self, *words: str) -> str:
        """What the command line says, which succeeds."""
        done = await asyncio.to_thread(self.node.run, *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @asynccontextmanager
    async def streaming(self, model: str, upstream: ScriptedUpstream, number: int) -> AsyncIterator[Wire]:
        """A stream whose first word has come."""
        async with await self.node.connect() as wire:
            wire.send(self.node.chat_request(model=model, stream=True))
            await upstream.arrival(number)
            assert (await wire.read_head()).status == 200
            yield wire


def slow(go: asyncio.Event) -> list[Any]:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    done = [Send(chunk(PIECE % (b"lo", b'"stop"'))), Send(chunk(b"data: [DONE]\n\n")), Send(LAST_CHUNK)]
    return [Send(head), Send(chunk(PIECE % (b"Hel", b"null"))), Wait(go), *done]


@pytest.fixture(scope="module")
def started(chat_model: StoredModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("configuration")
    file = folder / "helixflow.toml"
    file.write_text(toml("first"))
    fill_store(folder / "data", chat_model)
    with run_node(folder / "data", HELIXFLOW_CONFIG=str(file)) as node:
        yield Served(node, file)


@pytest.fixture
async def served(started: Served) -> Served:
    """Serves `first` alone."""
    await started.apply(first=[served_by("http://127.0.0.1:9")])
    return started


async def test_all_three_ways_change_what_is_served_and_leave_a_stream_alone(served: Served, tmp_path: Path) -> None:
    go = asyncio.Event()
    async with ScriptedUpstream([slow(go), [WHOLE], [WHOLE], [WHOLE]]) as upstream:
        await served.apply(streamed=[served_by(upstream.base_url)])
        async with served.streaming("streamed", upstream, 1) as wire:
            await served.apply(by_api=[served_by(upstream.base_url)])
            assert (await served.chat("by_api")).status == 200
            given = tmp_path / "models.toml"
            given.write_text(toml("by-apply", base_url=f"{upstream.base_url}/v1", more='[log]\nlevel = "info"\n'))
            said = await served.run("apply", "-f", str(given), "--note", "why")
            assert "+ model by-apply" in said and f"not taken from {given}: log" in said
            await served.wait_for("by-apply")
            assert (await served.chat("by-apply")).status == 200
            served.file.write_text(toml("by-file", base_url=f"{upstream.base_url}/v1"))
            await served.wait_for("by-file")
            assert (await served.chat("by-file")).status == 200
            go.set()
            pieces = []
            while piece := await wire.read_chunk():
                pieces.append(piece)
            assert piece == b""
        whole = b"".join(pieces)
        assert b'"Hel"' in whole and b'"lo"' in whole and whole.endswith(b"data: [DONE]\n\n")
    versions = (await served.ask("GET", "/configuration/revisions")).json["data"]
    assert [(one["origin"], one["note"]) for one in versions[:3]] == [("file", None), ("apply", "why"), ("api", None)]
    assert not served.node.records("error")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (toml("bad") + "weight = -1\n", ":6: models[0].deployments[0].weight: "),
        ("[[models]\n", "not valid TOML"),
        (toml("bad") + 'api_key_file = "/nowhere/key"\n', ":6: models[0].deployments[0].api_key_file: "),
        ('[[models]]\nname = "nobody-knows-this"\n', "is neither in the catalogue nor"),
        (LOCAL % "/nowhere/m.gguf", ":5: models[0].deployments[0].source: model file /nowhere/m.gguf: No such file"),
    ],
)  # fmt: skip
async def test_a_bad_file_changes_nothing_and_says_why(served: Served, text: str, reason: str) -> None:
    told = len(served.node.records("configuration.refused"))
    version = (await served.ask("GET", "/configuration")).json["version"]
    served.file.write_text(text)
    await eventually(lambda: len(served.node.records("configuration.refused")) > told)
    assert reason in served.node.records("configuration.refused")[-1]["reason"]
    assert await served.names() == {"first"}
    assert (await served.ask("GET", "/configuration")).json["version"] == version
    # The same through the command line: with the line of the file.
    refused = await asyncio.to_thread(served.node.run, "apply", "-f", str(served.file))
    assert (refused.returncode, reason in refused.stderr) == (3, True), refused.stderr


async def test_a_pipe_in_the_place_of_the_file_is_not_waited_for(served: Served, tmp_path: Path) -> None:
    gone = len(served.node.records("configuration.file_gone"))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "pipe").rename(served.file)
    await eventually(lambda: len(served.node.records("configuration.file_gone")) > gone)
    served.file.unlink()
    served.file.write_text(toml("second"))
    await served.wait_for("second")


async def test_other_sections_of_the_file_wait_for_a_restart_and_are_named(served: Served) -> None:
    served.file.write_text(toml("first", more='[log]\nlevel = "debug"\n[gateway]\nkeep_alive_s = 70\n'))
    told = await eventually(lambda: served.node.records("configuration.restart_needed"))
    assert set(told[-1]["sections"]) == {"log", "gateway"}


async def test_a_plan_names_recorded_requests_and_a_rollback_brings_them_back(served: Served) -> None:
    async with ScriptedUpstream([[WHOLE]] * 4) as upstream:
        first = await served.apply(counted=[served_by(upstream.base_url)])
        for _ in range(3):
            assert (await served.chat("counted")).status == 200

        async with asyncio.timeout(WAIT_S):
            while True:
                plan = await served.ask("POST", "/configuration/plan", {"models": [{"name": CHAT_MODEL}]})
                counts = {one["model"]: one for one in plan.json["changes"] if one["deployment"] is None}
                if counts["counted"]["requests"] == 3:
                    break
                await asyncio.sleep(0.1)
        assert counts["counted"] | {"fields": []} == {
            "model": "counted", "deployment": None, "kind": "removed", "fields": [], "requests": 3, "unserved": True
        }  # fmt: skip
        await served.apply(other=[served_by(upstream.base_url)])
        assert "- model" not in await served.run("config", "plan", "--revision", str(first + 1))
        said = await served.run("config", "rollback", str(first))
        assert f"version {first + 2} is in force" in said
        await served.wait_for("counted")
        assert (await served.chat("counted")).status == 200
        history = json.loads(await served.run("config", "history", "--json"))["versions"]
        assert [(one["origin"], one["note"]) for one in history[:1]] == [("rollback", f"back to {first}")]
        # That it follows is what the gateway says itself, a moment later.
        async with asyncio.timeout(WAIT_S):
            while True:
                status = json.loads(await served.run("config", "status", "--json"))
                followers = [(one["service"], one["version"], one["problem"]) for one in status["followers"]]
                if followers == [("gateway", first + 2, None)]:
                    break


async def test_a_key_file_that_changes_is_used_without_a_restart(served: Served, tmp_path: Path) -> None:
    key = tmp_path / "provider.key"
    key.write_text("sk-one")
    async with ScriptedUpstream([[WHOLE]] * 2) as upstream:
        await served.apply(keyed=[served_by(upstream.base_url, api_key_file=str(key))])
        await served.chat("keyed")
        key.write_text("sk-two-is-longer")
        await eventually(lambda: served.node.records("keys.renewed"))
        await served.chat("keyed")
        sent = [recorded.headers["authorization"] for recorded in upstream.requests]
        assert sent == ["Bearer sk-one", "Bearer sk-two-is-longer"]
    assert "sk-" not in served.node.err.read_text()


async def test_an_engine_comes_and_goes_with_its_model(served: Served) -> None:
    applied = await served.ask("PUT", "/configuration", {"models": [{"name": CHAT_MODEL}]})
    assert applied.status == 200, applied.body
    await served.wait_for(CHAT_MODEL)
    assert (await served.node.chat(max_tokens=2)).status == 200
    engine = served.node.find("llama_cpp.child")
    await served.apply(first=[served_by("http://127.0.0.1:9")])
    await asyncio.to_thread(until, lambda: not engine.is_running())


async def test_a_restart_keeps_what_was_applied(tmp_path: Path) -> None:
    file = tmp_path / "helixflow.toml"
    file.write_text(toml("of-the-file"))
    with run_node(tmp_path / "data", HELIXFLOW_CONFIG=str(file)) as node:
        served = Served(node, file)
        await served.wait_for("of-the-file")
        version = await served.apply(applied=[served_by("http://127.0.0.1:9")])
        # Processes that are started anew begin with it as well.
        node.find("launch.gateway").kill()
        node.find("launch.control").kill()
        await eventually(lambda: len(node.records("auth.serving")) == 2)
        await asyncio.to_thread(until, node._is_ready)
        assert await served.names() == {"applied"}
    with run_node(tmp_path / "data", HELIXFLOW_CONFIG=str(file)) as node:
        served = Served(node, file)
        assert await served.names() == {"applied"}
        assert (await served.ask("GET", "/configuration")).json["version"] == version


async def test_a_model_file_that_has_vanished_since_keeps_nothing_else_from_being_served(tmp_path: Path) -> None:
    """A configuration file can be mended before the start that it stops; what was applied over the API cannot."""
    file = tmp_path / "helixflow.toml"
    file.write_text(toml("of-the-file"))
    settings = load_settings(file, environ={}, overrides={"data_dir": str(tmp_path / "data")})
    digest = digest_of(document_of(settings.models))
    local = {"engine": "llama_cpp", "source": f"file:{tmp_path / 'gone.gguf'}"}
    models = [
        {"name": "gone", "deployments": [local]},
        {"name": "applied", "deployments": [served_by("http://127.0.0.1:9")]},
    ]
    applied = document_of(read_document(json.dumps({"models": models})))
    settings.data_dir.mkdir()
    cache = ServingCache(revision=2, document=applied, complete=applied, file_digest=digest, config=str(file))
    write_cache(settings, cache)
    node = Node(settings.data_dir, HELIXFLOW_CONFIG=str(file))
    try:
        node.find_port()
        failed = await eventually(lambda: node.records("deployment.failed"))
        assert str(tmp_path / "gone.gguf") in failed[-1]["cause"]
        async with asyncio.timeout(WAIT_S):
            while (listed := await node.ask("GET", "/v1/models")).status != 200:
                await asyncio.sleep(0.05)  # it is never ready
        assert {model["id"] for model in listed.json["data"]} == {"gone", "applied"}
        await node.until_states({"gone/llama_cpp-0": "failed"})
        answer = await node.chat(model="gone")
        assert (answer.status, "retry-after" in answer.headers) == (502, True)
    finally:
        node.close()
