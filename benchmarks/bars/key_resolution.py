"""How long a gateway waits for a key that it does not know yet: gRPC with mutual TLS, a million keys in the database.

Keys are of projects (half), of service accounts with a built-in role, and of accounts that are members of a project.
"""

import asyncio
import contextlib
import hashlib
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import uvloop

from benchmarks.processes import serving
from benchmarks.report import Options, Result, number
from helixflow.pki.identity import ServiceIdentity
from helixflow.pki.issuing import Issuance
from helixflow.pki.names import SERVICES
from helixflow.rpc.channels import create_channel
from helixflow.rpc.generated.auth_v1 import identity_pb2, identity_pb2_grpc
from helixflow.rpc.sockets import socket_path
from helixflow.settings.tree import Settings
from helixflow.storage.sqlite import FILE_NAME
from helixflow.storage.upgrade import upgrade
from helixflow.telemetry.logs import configure_logging
from tests.harness.postgres import PostgresServer

LIMIT_MS = 5.0
PARALLEL = 8
_WARM_UP = 200
# How keys are spread; primes, so that no pattern of ids meets one of the questions.
_ORGANISATIONS, _PROJECTS, _OWNERS = 101, 1009, 1009
_PRIME = 7_919
_CHUNK = 50_000
_NOW = 1_700_000_000
_STAMPS: dict[str, Any] = {"created_at": _NOW, "updated_at": _NOW, "version": 1}


def run(options: Options) -> list[Result]:
    configure_logging("warning", "text", service="benchmarks")
    count, questions = (50_000, 500) if options.quick else (1_000_000, 4_000)
    with tempfile.TemporaryDirectory(prefix="hf-") as name, _postgresql() as server, server.database() as url:
        folder = Path(name)
        return [
            *_measure("SQLite", Settings(data_dir=folder / "sqlite"), count, questions),
            *_measure(
                "PostgreSQL",
                Settings(data_dir=folder / "postgresql", database=server.settings(url, folder)),
                count,
                questions,
            ),
        ]


@contextlib.contextmanager
def _postgresql() -> Iterator[PostgresServer]:
    try:
        server = PostgresServer.create()
    except AssertionError as exc:
        raise RuntimeError(str(exc)) from exc
    try:
        yield server
    finally:
        server.remove()


def _measure(database: str, settings: Settings, count: int, questions: int) -> list[Result]:
    settings.data_dir.mkdir(parents=True)
    asyncio.run(upgrade(settings))
    started = time.monotonic()
    asyncio.run(_fill(settings, count))
    build_s = time.monotonic() - started
    Issuance(settings).ensure(SERVICES)
    file = settings.data_dir / "settings.json"
    file.write_text(settings.model_dump_json(exclude_unset=True))
    with serving("benchmarks.auth_server", str(file)):
        alone, together = uvloop.run(_ask(settings, count, questions))
    results = [Result("key_resolution", f"{database}: filling", build_s, "s", detail=f"{count:,} keys")]
    for mode, times in (("one by one", alone), (f"{PARALLEL} at a time", together)):
        times.sort()
        p50, p99, worst = (times[min(len(times) - 1, int(len(times) * part))] for part in (0.5, 0.99, 1.0))
        detail = f"p50 {number(p50)}, worst {number(worst)} ms of {len(times):,}"
        # Eight that ask without a pause fill the core, and then wait for each other: that is a rate, told by its p50.
        limit = LIMIT_MS if times is alone else None
        results.append(Result("key_resolution", f"{database}: {mode}, p99", p99, "ms", limit, detail=detail))
    return results


async def _ask(settings: Settings, count: int, questions: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each question, one by one and in parallel. No key is asked for twice."""
    identity = ServiceIdentity.open(settings, "gateway")
    async with create_channel(socket_path(settings.run_dir, "control"), identity, "control") as channel:
        stub = identity_pb2_grpc.IdentityServiceStub(channel)
        keys = iter([_hash_of(index * _PRIME % count) for index in range(1, _WARM_UP + 2 * questions + 1)])

        async def ask(repeat: int) -> list[float]:
            times = []
            for _ in range(repeat):
                question = identity_pb2.ResolveKeyRequest(key_hash=next(keys))
                begun = time.perf_counter()
                await stub.ResolveKey(question, timeout=5)
                times.append((time.perf_counter() - begun) * 1000)
            return times

        await _until_quiet(stub)
        await ask(_WARM_UP)
        alone = await ask(questions)
        together = await asyncio.gather(*(ask(questions // PARALLEL) for _ in range(PARALLEL)))
        return alone, [each for times in together for each in times]


async def _until_quiet(stub: identity_pb2_grpc.IdentityServiceStub) -> None:
    """Until the service has made its first signing key, which takes a core for a second or two."""
    async with asyncio.timeout(60):
        async for message in stub.WatchChanges(identity_pb2.WatchChangesRequest(), timeout=60):
            if message.signing_keys:
                return


def _hash_of(index: int) -> bytes:
    return hashlib.sha256(b"key %d" % index).digest()


async def _fill(settings: Settings, count: int) -> None:
    """Writes straight into the tables."""
    tables = {
        "organisations": (
            {"id": f"org_{n}", "name": f"Organisation {n}", "audit_retention_days": 0, **_STAMPS}
            for n in range(_ORGANISATIONS)
        ),
        "projects": (
            {"id": f"proj_{n}", "organisation_id": _organisation(n), "name": f"Project {n}", **_STAMPS}
            for n in range(_PROJECTS)
        ),
        "service_accounts": (
            {
                "id": f"sa_{n}",
                "organisation_id": _organisation(n),
                "project_id": f"proj_{n}",
                "name": "robot",
                "role": "developer",
                **_STAMPS,
            }
            for n in range(_OWNERS)
        ),
        "accounts": (
            {
                "id": f"user_{n}",
                "email": f"user{n}@example.com",
                "email_key": f"user{n}@example.com",
                "name": "Somebody",
                "home_organisation_id": _organisation(n),
                "operator": False,
                "totp_used": 0,
                **_STAMPS,
            }
            for n in range(_OWNERS)
        ),
        "memberships": (
            {
                "account_id": f"user_{n}",
                "organisation_id": _organisation(n),
                "project_id": f"proj_{n}",
                "role": "developer",
                **_STAMPS,
            }
            for n in range(_OWNERS)
        ),
        "api_keys": (_key(index) for index in range(count)),
    }
    if settings.database.url == "sqlite":
        await asyncio.to_thread(_fill_sqlite, settings.data_dir / FILE_NAME, tables)
    else:
        await _fill_postgresql(settings, tables)


def _organisation(project: int) -> str:
    return f"org_{project % _ORGANISATIONS}"


def _key(index: int) -> dict[str, Any]:
    project = index % _PROJECTS
    return {
        "id": f"key_{index:024x}",
        "hash": _hash_of(index),
        "hint": "hfk_abcd…wxyz",
        "name": f"key number {index}",
        "organisation_id": _organisation(project),
        "project_id": f"proj_{project}",
        "owner_id": ("", f"sa_{project}", "", f"user_{project}")[index % 4],
        "scopes": '["models:read","models:use"]',
        "models": "[]",
        "networks": "[]",
        "created_by": f"user_{project}",
        "superseded": False,
        "bootstrap": False,
        **_STAMPS,
        "created_at": _NOW + index,
    }


def _fill_sqlite(path: Path, tables: dict[str, Iterator[dict[str, Any]]]) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA cache_size = -262144")
        for table, rows in tables.items():
            for chunk in _chunks(rows):
                columns = ", ".join(chunk[0])
                marks = ", ".join(f":{column}" for column in chunk[0])
                connection.executemany(f"INSERT INTO {table} ({columns}) VALUES ({marks})", chunk)
        connection.commit()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


async def _fill_postgresql(settings: Settings, tables: dict[str, Iterator[dict[str, Any]]]) -> None:
    assert settings.database.password is not None
    connection = await asyncpg.connect(settings.database.url, password=settings.database.password.read())
    try:
        for table, rows in tables.items():
            for chunk in _chunks(rows):
                records = [tuple(row.values()) for row in chunk]
                await connection.copy_records_to_table(table, records=records, columns=list(chunk[0]))
        await connection.execute("ANALYZE")
    finally:
        await connection.close()


def _chunks(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    chunk = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
