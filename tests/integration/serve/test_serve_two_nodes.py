"""Two nodes on one PostgreSQL, as a fleet begins: what is done on one holds on the other."""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from helixflow.auth.changes import ChangeFeed
from helixflow.auth.housekeeping import SessionHousekeeping
from helixflow.auth.master_key import load_master_key
from helixflow.auth.sealing import Sealer
from helixflow.auth.signing_key_rotation import SigningKeyRotation
from helixflow.auth.signing_keys import SigningKeys
from helixflow.auth.unit import Units
from helixflow.cli.main import main
from helixflow.core.clock import FakeClock
from helixflow.core.errors import ExitCode
from helixflow.core.keys import generate_key
from helixflow.settings.tree import AuthSettings, DatabaseSettings, Settings
from helixflow.storage.engine import open_database
from tests.harness.node import READY_S, WAIT_S, Node, environment, write_idle_config
from tests.harness.postgres import PostgresServer
from tests.harness.visitor import EFFECTIVE_S, Visitor, header_of, until_refused, visit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the nodes find what they share: the password, and the master key."""
    folder = tmp_path_factory.mktemp("fleet")
    key = folder / "fleet.key"
    key.touch(mode=0o600)
    key.write_text(secrets.token_hex(32))
    return folder


@pytest.fixture(scope="module")
def database_url(postgres_server: PostgresServer) -> Iterator[str]:
    with postgres_server.database() as url:
        yield url


@pytest.fixture(scope="module")
def settings_of(postgres_server: PostgresServer, folder: Path, database_url: str) -> Callable[..., dict[str, str]]:
    """The environment of a node on the database."""

    def make(**more: str) -> dict[str, str]:
        database = postgres_server.settings(database_url, folder)
        return {
            "HELIXFLOW_CONFIG": str(write_idle_config(folder)),
            "HELIXFLOW_DATABASE__URL": database.url,
            "HELIXFLOW_DATABASE__PASSWORD_FILE": str(database.password_file),
            "HELIXFLOW_AUTH__MASTER_KEY_FILE": str(folder / "fleet.key"),
            **more,
        }

    return make


@pytest.fixture(scope="module")
def nodes(folder: Path, settings_of: Callable[..., dict[str, str]]) -> Iterator[tuple[Node, Node]]:
    """Both started at once, on an empty database."""
    shared = {"HELIXFLOW_BOOTSTRAP_API_KEY": generate_key()}
    with contextlib.ExitStack() as stack:
        pair = [Node(folder / name, **settings_of(**shared)) for name in ("a", "b")]
        for node in pair:
            stack.callback(node.close)
            node.key = shared["HELIXFLOW_BOOTSTRAP_API_KEY"]
        first, second = (node.wait_ready() for node in pair)
        yield first, second


@pytest.fixture
async def visitors(nodes: tuple[Node, Node]) -> AsyncIterator[tuple[Visitor, Visitor]]:
    """The operator, at each of them."""
    async with visit(nodes[0]) as at_a, visit(nodes[1]) as at_b:
        yield at_a, at_b


def at(place: Visitor, who: Visitor) -> Visitor:
    """The same person at the other node."""
    return place.as_other(who.credential, who.refresh_token)


async def kids(visitor: Visitor) -> list[str]:
    keys = (await visitor.ask("GET", "/.well-known/jwks.json")).json()["keys"]
    return sorted(key["kid"] for key in keys)


async def agree(a: Visitor, b: Visitor, wanted: Callable[[list[str]], bool]) -> None:
    """Both publish the same signing keys, as wanted, a moment later."""
    async with asyncio.timeout(EFFECTIVE_S):
        while not (wanted(await kids(a)) and await kids(a) == await kids(b)):
            await asyncio.sleep(0.02)


async def test_started_at_once_on_an_empty_database_they_are_one_installation(
    visitors: tuple[Visitor, Visitor], nodes: tuple[Node, Node]
) -> None:
    a, b = visitors
    assert (await a.admin("GET", "/organisations")).json() == (await b.admin("GET", "/organisations")).json()
    await agree(a, b, lambda found: len(found) == 1)
    checked = await asyncio.to_thread(nodes[0].run, "db", "check")
    assert checked.returncode == 0, checked.stderr
    for node in nodes:
        assert not node.records("process.exited"), node.err.read_text()


async def test_a_key_works_on_both_until_it_is_revoked_on_one(visitors: tuple[Visitor, Visitor]) -> None:
    a, b = visitors
    took = []
    for number in range(10):
        made = await a.make("/keys", {"name": f"key {number}"})
        here, there = a.as_other(made["secret"]), b.as_other(made["secret"])
        assert (await there.models()).status_code == (await here.models()).status_code == 200
        revoking, watching = (b, here) if number % 2 else (a, there)
        await revoking.do("POST", f"/keys/{made['key']['id']}/revoke")
        took.append(await until_refused(watching))
        await until_refused(here)
        await until_refused(there)
    assert max(took) < EFFECTIVE_S


async def test_a_session_goes_from_one_to_the_other_and_ends_on_both(visitors: tuple[Visitor, Visitor]) -> None:
    a, b = visitors
    await a.new_user("walker@fleet.example", "developer")
    first = await a.sign_in("walker@fleet.example")
    second = await at(b, first).refresh()
    third = await at(a, second).refresh()
    sessions = [at(place, who) for place in (a, b) for who in (first, second, third)]
    for session in sessions:
        assert (await session.models()).status_code == 200
    reused = await a.as_other("").admin("POST", "/auth/refresh", {"refresh_token": first.refresh_token})
    assert reused.status_code == 401
    for session in sessions:
        await until_refused(session)
    for place in (a, b):
        again = await place.as_other("").admin("POST", "/auth/refresh", {"refresh_token": third.refresh_token})
        assert again.status_code == 401


async def test_an_idempotency_key_holds_on_both(visitors: tuple[Visitor, Visitor]) -> None:
    answers = await asyncio.gather(
        *(place.admin("POST", "/projects", {"name": "once"}, idempotency_key="fleet") for place in visitors * 4)
    )
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.text for answer in answers}) == 1


async def test_a_wrong_password_counts_on_both(visitors: tuple[Visitor, Visitor]) -> None:
    a, b = visitors
    await a.new_user("guessed@fleet.example", "viewer")
    body = {"email": "guessed@fleet.example", "password": "wrong"}
    codes = [(await place.as_other("").admin("POST", "/auth/login", body)).status_code for place in (a, b) * 6]
    assert 429 in codes and set(codes) <= {401, 429}
    assert codes == sorted(codes), "no node lets in whom the other has locked out"


async def test_both_rotate_their_signing_keys_and_forget_old_ones(
    visitors: tuple[Visitor, Visitor], nodes: tuple[Node, Node], settings_of: Callable[..., dict[str, str]]
) -> None:
    a, b = visitors
    await a.new_user("signed@fleet.example", "developer")
    before = await a.sign_in("signed@fleet.example")
    old = await kids(a)
    rotated = await asyncio.gather(*(place.make("/signing-keys/rotate", None) for place in (a, b)))
    made = {one["kid"] for one in rotated}
    assert len(made) == 2
    await agree(a, b, lambda found: set(found) == {*old, *made})
    assert (await at(b, before).models()).status_code == 200
    # Two hours on, seen from two control processes whose turn it is to tidy up.
    given = settings_of()
    settings = Settings(
        data_dir=nodes[0].data_dir,
        database=DatabaseSettings(
            url=given["HELIXFLOW_DATABASE__URL"], password_file=Path(given["HELIXFLOW_DATABASE__PASSWORD_FILE"])
        ),
        auth=AuthSettings(master_key_file=Path(given["HELIXFLOW_AUTH__MASTER_KEY_FILE"])),
    )
    async with asyncio.timeout(WAIT_S):
        await asyncio.gather(*(tidy_up(settings, time.time() + 7200) for _ in range(2)))
    await agree(a, b, lambda found: len(found) == 1 and set(found) <= made)
    for place in (a, b):
        await until_refused(at(place, before))  # its key is gone
        # The key that is left begins to sign ten seconds after it was made: a sign-in waits for it.
        session = await place.sign_in("signed@fleet.example")
        assert header_of(session.credential)["kid"] in made
        assert (await at(a, session).models()).status_code == (await at(b, session).models()).status_code == 200


async def test_a_leaked_signing_key_is_cut_off_on_both_at_once(visitors: tuple[Visitor, Visitor]) -> None:
    a, b = visitors
    await a.new_user("leaked@fleet.example", "developer")
    session = await a.sign_in("leaked@fleet.example")
    leaked = header_of(session.credential)["kid"]
    for place in (a, b):
        assert (await at(place, session).models()).status_code == 200, "verified there, and kept"
    cut = await a.make("/signing-keys/rotate", {"revoke_others": True})
    assert cut["kid"] != leaked
    await agree(a, b, lambda found: found == [cut["kid"]])
    for place in (a, b):
        await until_refused(at(place, session))
        async with asyncio.timeout(EFFECTIVE_S):
            while (await at(place, session).admin("GET", "/me")).status_code != 401:
                await asyncio.sleep(0.02)
    renewed = await at(b, session).refresh()
    assert header_of(renewed.credential)["kid"] == cut["kid"], "it signs at once"
    for place in (a, b):
        assert (await at(place, renewed).models()).status_code == 200
        assert (await at(place, renewed).admin("GET", "/me")).status_code == 200


async def tidy_up(settings: Settings, now: float) -> None:
    """What a control process does every few minutes, at that time."""
    database = open_database(settings)
    clock = FakeClock(now)
    units = Units(database, clock, ChangeFeed(database, clock))
    sealer = Sealer(load_master_key(settings).key)
    rotation = SigningKeyRotation(units, SigningKeys(database, sealer, clock), sealer)
    try:
        await SessionHousekeeping(units, rotation).run_once()
    finally:
        await database.close()


async def test_of_many_writes_on_both_none_breaks_the_chain_or_the_revisions(
    visitors: tuple[Visitor, Visitor], nodes: tuple[Node, Node], tmp_path: Path
) -> None:
    a, b = visitors
    await asyncio.gather(*(place.make("/keys", {"name": f"{n}"}) for n in range(20) for place in (a, b)))
    file = tmp_path / "audit.jsonl"
    file.write_bytes((await b.admin("GET", "/audit/export")).content)
    verified = await asyncio.to_thread(nodes[1].run, "audit", "verify", str(file), "--json")
    assert verified.returncode == 0, verified.stdout
    assert json.loads(verified.stdout)["records"] > 40


def test_another_master_key_is_refused(
    folder: Path, nodes: tuple[Node, Node], settings_of: Callable[..., dict[str, str]]
) -> None:
    key = folder / "other.key"
    key.touch(mode=0o600)
    key.write_text(secrets.token_hex(32))
    node = Node(folder / "c", **settings_of(HELIXFLOW_AUTH__MASTER_KEY_FILE=str(key)))
    try:
        assert node.process.wait(READY_S) == ExitCode.CONFIG
    finally:
        node.close()
    (failed,) = node.records("control.failed")
    assert str(key) in failed["reason"]
    assert "not the master key of this database" in failed["reason"]
    assert key.read_text() not in node.err.read_text()


def test_the_command_line_and_the_start_know_every_state_of_the_schema(
    postgres_server: PostgresServer,
    tmp_path: Path,
    settings_of: Callable[..., dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with postgres_server.database() as url:
        settings = settings_of(HELIXFLOW_DATABASE__URL=url)

        for name, value in environment(tmp_path / "data", **settings).items():
            monkeypatch.setenv(name, value)

        # It would bind every logger of this process to a stream that closes with the test.
        monkeypatch.setattr("helixflow.telemetry.logs.configure_logging", lambda *_args, **_options: None)

        def db(*words: str) -> tuple[int, str, str]:
            """`helixflow db`, in this process: each start of another one takes longer than what it does."""
            code = main(["db", *words])
            return code, *capsys.readouterr()

        def state() -> str:
            return str(json.loads(db("current", "--json")[1])["state"])

        assert state() == "empty"
        assert db("upgrade", "--to", "0001")[0] == 0
        code, _, said = db("check")
        assert (code, "helixflow db upgrade" in said) == (ExitCode.STORAGE, True)
        assert state() == "older"
        assert db("upgrade")[0] == 0
        assert db("check")[0] == 0
        assert state() == "current"
        postgres_server.execute("UPDATE alembic_version SET version_num = '9999'", url.rpartition("/")[2])
        assert state() == "newer"
        for words in ("check", "upgrade"):
            code, _, said = db(words)
            assert code == ExitCode.STORAGE
            assert "newer" in said and "Traceback" not in said
        node = Node(tmp_path / "data", **settings)
        try:
            assert node.process.wait(READY_S) == ExitCode.STORAGE
        finally:
            node.close()
        (failed,) = node.records("control.failed")
        assert "newer" in failed["reason"]
        assert postgres_server.role_password not in node.err.read_text()
