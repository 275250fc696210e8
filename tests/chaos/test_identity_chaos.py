"""What is known goes on while auth or its database is away; what is not known is not let in; and all of it heals."""

import asyncio
import contextlib
import json
import signal
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from helixflow.core.keys import generate_key
from helixflow.storage.sqlite import FILE_NAME
from tests.harness.node import Node, eventually, run_node, write_idle_config
from tests.harness.postgres import PostgresServer
from tests.harness.visitor import Visitor, until_refused, visit

CONTROL = "helixflow.launch.control"
GATEWAY = "helixflow.launch.gateway"
HEALED_S = 60.0
# A look-up that gets no answer takes 2 s, and the grace 2 s more; the rest is for slow machines.
GRACE_LIMIT_S = 60.0


@pytest.fixture
def start_idle(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """Starts a node without engines; `settings` are environment variables."""
    with contextlib.ExitStack() as stack:
        config = {"HELIXFLOW_CONFIG": str(write_idle_config(tmp_path))}
        yield lambda **settings: stack.enter_context(run_node(tmp_path / "data", **config, **settings))


async def sign_up(operator: Visitor) -> tuple[str, Visitor, Visitor]:
    """A key with its id, and a session, that the gateway knows."""
    made = await operator.make("/keys", {"name": "known"})
    await operator.new_user("known@chaos.example", "developer")
    key, session = operator.as_other(made["secret"]), await operator.sign_in("known@chaos.example")
    assert (await key.models()).status_code == (await session.models()).status_code == 200
    return made["key"]["id"], key, session


class Load:
    """Somebody who asks all the time; `statuses` are the answers, by name."""

    def __init__(self) -> None:
        self.statuses: dict[str, list[int]] = {}

    @contextlib.asynccontextmanager
    async def asking(self, **visitors: Visitor) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._ask(name, visitor)) for name, visitor in visitors.items()]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if not isinstance(result, asyncio.CancelledError):
                    raise result if isinstance(result, BaseException) else AssertionError(result)

    async def _ask(self, name: str, visitor: Visitor) -> None:
        while True:
            self.statuses.setdefault(name, []).append((await visitor.models()).status_code)
            await asyncio.sleep(0.02)


def assert_unavailable(answer: httpx2.Response) -> None:
    """A problem document that says when to come again."""
    assert answer.status_code == 503, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "service_unavailable"
    assert int(answer.headers["retry-after"]) >= 1


async def until_made(operator: Visitor, name: str) -> dict[str, object]:
    """A key, as soon as one can be made; refusals on the way are told as what they are."""
    deadline = time.monotonic() + HEALED_S
    while (answer := await operator.admin("POST", "/keys", {"name": name})).status_code != 201:
        assert_unavailable(answer)
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    made: dict[str, object] = answer.json()
    return made


async def test_a_database_killed_under_load(
    start_idle: Callable[..., Node], postgres_server: PostgresServer, tmp_path: Path
) -> None:
    with postgres_server.database() as url:
        database = postgres_server.settings(url, tmp_path)
        node = start_idle(HELIXFLOW_DATABASE__URL=url, HELIXFLOW_DATABASE__PASSWORD_FILE=str(database.password_file))
        async with visit(node) as operator:
            key_id, key, session = await sign_up(operator)
            load = Load()
            async with load.asking(key=key, session=session):
                await asyncio.to_thread(postgres_server.kill)
                fresh = [operator.as_other(generate_key()) for _ in range(5)]
                assert {(await visitor.models()).status_code for visitor in fresh} == {503}
                for method, path, body in (
                    ("GET", "/users", None),
                    ("POST", "/projects", {"name": "not now"}),
                    ("POST", "/auth/login", {"email": "known@chaos.example", "password": "x"}),
                ):
                    assert_unavailable(await operator.admin(method, path, body))
                await eventually(lambda: node.records("changes.unreadable"))
                assert_unavailable(await session.admin("GET", "/me"))
                await asyncio.to_thread(postgres_server.start)
                made = await until_made(operator, "after")
                await operator.do("POST", f"/keys/{key_id}/revoke")
                await until_refused(key)
                await eventually(lambda: 401 in load.statuses["key"])
                assert (await operator.as_other(str(made["secret"])).models()).status_code == 200
                assert {(await visitor.models()).status_code for visitor in fresh} == {401}
            assert set(load.statuses["session"]) == {200}
            assert set(load.statuses["key"]) == {200, 401}
            assert not node.records("process.exited")


@pytest.fixture(scope="module")
def hardy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """One that survives what is done to it, on SQLite."""
    folder = tmp_path_factory.mktemp("hardy")
    with run_node(folder / "data", HELIXFLOW_CONFIG=str(write_idle_config(folder))) as node:
        yield node


async def test_control_killed_amid_writes_leaves_each_of_them_whole(hardy: Node, tmp_path: Path) -> None:
    """Retried with their idempotency keys, all are done exactly once."""
    wanted = [f"written {number}" for number in range(60)]
    async with visit(hardy) as operator:

        async def write(name: str) -> httpx2.Response:
            return await operator.admin("POST", "/projects", {"name": name}, idempotency_key=name.replace(" ", "-"))

        control = hardy.find(CONTROL)
        writes = [asyncio.create_task(write(name)) for name in wanted]
        for number, one in enumerate(asyncio.as_completed(writes), 1):
            await one
            if number == 10:
                break
        control.kill()
        answers = await asyncio.gather(*writes)
        done = {answer.json()["name"]: answer.json()["id"] for answer in answers if answer.status_code == 201}
        assert 10 <= len(done) < len(wanted), "killed in the middle"
        assert {answer.status_code for answer in answers} - {201} <= {502, 503}
        await until_made(operator, "a sign of life")
        again = await asyncio.gather(*(write(name) for name in wanted))
        assert {answer.status_code for answer in again} == {201}
        ids = {answer.json()["name"]: answer.json()["id"] for answer in again}
        assert set(ids) == set(wanted)
        assert ids.items() >= done.items(), "what was told once is told again"
        listed = (await operator.admin("GET", "/projects?limit=100")).json()["data"]
        names = [project["name"] for project in listed]
        assert sorted(name for name in names if name.startswith("written")) == sorted(wanted)
        file = tmp_path / "audit.jsonl"
        file.write_bytes((await operator.admin("GET", "/audit/export")).content)
    verified = await asyncio.to_thread(hardy.run, "audit", "verify", str(file), "--json")
    assert verified.returncode == 0, verified.stdout
    created = [json.loads(line) for line in file.read_text().splitlines() if '"create_project"' in line]
    assert len(created) == len(wanted), "each recorded once"
    with contextlib.closing(sqlite3.connect(hardy.data_dir / FILE_NAME)) as database:
        revisions = [number for (number,) in database.execute("SELECT revision FROM changes ORDER BY revision")]
        (latest,) = database.execute("SELECT number FROM installation WHERE name = 'revision'").fetchone()
    assert revisions == list(range(1, latest + 1)), "without gaps"


async def test_control_killed_and_what_it_knew_goes_on(hardy: Node) -> None:
    async with visit(hardy) as operator:
        key_id, key, session = await sign_up(operator)
        load = Load()
        async with load.asking(key=key, session=session):
            control, gateway = hardy.find(CONTROL), hardy.find(GATEWAY)
            control.kill()
            control.wait(HEALED_S)
            assert (await operator.as_other(generate_key()).models()).status_code == 503
            assert_unavailable(await operator.admin("GET", "/users"))
            await until_made(operator, "after")
            await operator.do("POST", f"/keys/{key_id}/revoke")
            await until_refused(key)
            await eventually(lambda: 401 in load.statuses["key"])
        assert set(load.statuses["session"]) == {200}
        assert set(load.statuses["key"]) == {200, 401}
        assert load.statuses["key"] == sorted(load.statuses["key"]), "refused once, refused for good"
        assert hardy.find(GATEWAY).pid == gateway.pid


async def test_an_auth_that_hangs_is_believed_for_the_grace_and_no_longer(start_idle: Callable[..., Node]) -> None:
    node = start_idle(HELIXFLOW_GATEWAY__KEY_CACHE_TTL_S="1", HELIXFLOW_GATEWAY__KEY_CACHE_GRACE_S="2")
    async with visit(node) as operator:
        _, key, session = await sign_up(operator)
        control = node.find(CONTROL)
        control.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        load = Load()
        try:
            async with load.asking(key=key, session=session, stranger=operator.as_other(generate_key())):
                for visitor in (key, session):
                    await until_refused(visitor, 503, GRACE_LIMIT_S)
                assert time.monotonic() - begun > 2, "not before the grace is over"
                asked = {name: len(statuses) for name, statuses in load.statuses.items()}
                await eventually(lambda: all(len(load.statuses[name]) > asked[name] + 1 for name in ("key", "session")))
        finally:
            control.send_signal(signal.SIGCONT)
        for name in ("key", "session"):
            assert load.statuses[name] == sorted(load.statuses[name]), "refused once, refused until it is back"
            assert set(load.statuses[name]) == {200, 503}
        assert set(load.statuses["stranger"]) == {503}
        for visitor in (key, session):
            async with asyncio.timeout(HEALED_S):
                while (await visitor.models()).status_code != 200:
                    await asyncio.sleep(0.02)
        assert (await operator.admin("GET", "/me")).status_code == 200


async def test_certificates_renewed_again_and_again_under_load(start_idle: Callable[..., Node]) -> None:
    """Their life is some seconds, but longer than a start takes; all of them change twice meanwhile."""
    life_s = 15
    node = start_idle(HELIXFLOW_PKI__CERTIFICATE_HOURS=str(life_s / 3600), HELIXFLOW_GATEWAY__KEY_CACHE_TTL_S="0.2")
    folder = node.data_dir / "pki"
    async with visit(node) as operator:
        _, key, session = await sign_up(operator)

        def certificates() -> frozenset[bytes]:
            return frozenset(path.read_bytes() for path in folder.rglob("*.pem"))

        seen: set[frozenset[bytes]] = set()
        load = Load()
        asked = 0
        deadline = time.monotonic() + 1.6 * life_s
        async with load.asking(key=key, session=session, stranger=operator.as_other(generate_key())):
            while time.monotonic() < deadline:
                answer = await operator.admin("GET", "/me")
                assert answer.status_code == 200, answer.text
                asked += 1
                if asked % 10 == 0:
                    made = await operator.make("/keys", {"name": f"{asked}"})
                    assert (await operator.as_other(made["secret"]).models()).status_code == 200
                    await operator.do("POST", f"/keys/{made['key']['id']}/revoke")
                    await until_refused(operator.as_other(made["secret"]))
                seen.add(await asyncio.to_thread(certificates))
                await asyncio.sleep(0.02)
        assert len(seen) > 3, "renewed more than once"
        assert set(load.statuses["key"]) == set(load.statuses["session"]) == {200}
        assert set(load.statuses["stranger"]) == {401}
        assert not node.records("watch.lost") and not node.records("process.exited")
