"""Whatever is done to keys in whatever order: a model says which secrets work at which time."""

import asyncio
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from helixflow.auth.authentication import find_key, held_by_key
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.keys import hash_key
from helixflow.rpc.generated.auth_v1 import admin_pb2 as pb
from helixflow.settings.tree import Settings
from helixflow.storage.engine import open_database
from helixflow.storage.sqlite import FILE_NAME
from tests.harness.auth import Installation

SECONDS = st.integers(1, 100)


@dataclass(slots=True)
class Key:
    """What must be true of a key. Times are those of the clock; `ends_at` None for never."""

    id: str
    secret: str
    ends_at: int | None
    revoked: bool = False
    rotated: bool = False

    def works(self, now: int) -> bool:
        return not self.revoked and (self.ends_at is None or now < self.ends_at)


class Rotation(RuleBasedStateMachine):
    """Keys of one project, as an operator administers them."""

    migrated: Path
    keys: "Bundle[Key]" = Bundle("keys")

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self._runner = asyncio.Runner()
        self._made: list[Key] = []
        shutil.copy(self.migrated, Path(self._folder.name) / FILE_NAME)
        self._run(self._open())

    async def _open(self) -> None:
        self._database = open_database(Settings(data_dir=Path(self._folder.name)))
        self._auth = Installation(self._database)
        acme = await self._auth.add_organisation()
        self._project = await self._auth.add_project(acme)
        _, self._operator = await self._auth.add_key(acme, self._project, bootstrap=True)

    def _run(self, work: Any) -> Any:
        return self._runner.run(work)

    def _call(self, rpc: str, request: Any) -> Any:
        """The answer, or the kind of the error."""
        try:
            return self._run(self._auth.call(self._operator, rpc, request))
        except HelixError as exc:
            return exc.kind

    def _can_change(self, key: Key) -> bool:
        return key.works(self._auth.now) and not key.rotated

    def _add(self, key: Key) -> Key:
        self._made.append(key)
        return key

    @rule(target=keys, lives_s=st.none() | SECONDS)
    def create(self, lives_s: int | None) -> Key:
        ends_at = None if lives_s is None else self._auth.now + lives_s
        request = pb.CreateKeyRequest(name="k", project_id=self._project, expires_at=ends_at or 0)
        made = self._call("CreateKey", request)
        return self._add(Key(made.key.id, made.secret, ends_at))

    @rule(target=keys, key=keys, overlap_s=st.just(0) | SECONDS)
    def rotate(self, key: Key, overlap_s: int) -> Key:
        answer = self._call("RotateKey", pb.RotateKeyRequest(id=key.id, overlap_s=overlap_s))
        if not self._can_change(key):
            assert answer is ErrorKind.CONFLICT
            return key
        successor = Key(answer.key.id, answer.secret, key.ends_at)
        key.rotated = True
        if overlap_s == 0:
            key.revoked = True
        else:
            ends_at = self._auth.now + overlap_s
            key.ends_at = ends_at if key.ends_at is None else min(ends_at, key.ends_at)
        return self._add(successor)

    @rule(key=keys)
    def revoke(self, key: Key) -> None:
        assert self._call("RevokeKey", pb.ChangeRequest(id=key.id)).revoked_at > 0
        key.revoked = True

    @rule(key=keys, lives_s=st.none() | SECONDS)
    def change_end(self, key: Key, lives_s: int | None) -> None:
        ends_at = None if lives_s is None else self._auth.now + lives_s
        answer = self._call("UpdateKey", pb.UpdateKeyRequest(id=key.id, expires_at=ends_at or 0))
        if self._can_change(key):
            key.ends_at = ends_at
            assert answer.expires_at == (ends_at or 0)
        else:
            assert answer is ErrorKind.CONFLICT

    @rule(seconds=SECONDS)
    def wait(self, seconds: int) -> None:
        self._auth.clock.advance(seconds)

    @invariant()
    def exactly_the_right_secrets_work(self) -> None:
        working = self._run(self._working())
        assert working == [key.secret for key in self._made if key.works(self._auth.now)]

    async def _working(self) -> list[str]:
        found = []
        async with self._database.reading() as connection:
            for key in self._made:
                row = await find_key(connection, hash_key(key.secret))
                if row is not None and await held_by_key(connection, row, self._auth.now) is not None:
                    found.append(key.secret)
        return found

    def teardown(self) -> None:
        self._run(self._auth.close())
        self._run(self._database.close())
        self._runner.close()
        self._folder.cleanup()


def test_exactly_the_right_secrets_work_at_any_time(migrated_sqlite: Path) -> None:
    Rotation.migrated = migrated_sqlite
    quick = settings(
        max_examples=10, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    run_state_machine_as_test(Rotation, settings=quick)  # type: ignore[no-untyped-call]
