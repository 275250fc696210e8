"""Refresh families against a model: at most one token of a session works, and a used one that comes again ends it."""

import asyncio
import shutil
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule, run_state_machine_as_test

from helixflow.auth.sessions import REFRESH_LIFE_S, SESSION_LIFE_S, EndReason, end_sessions
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import sessions_pb2 as pb
from helixflow.settings.tree import Settings
from helixflow.storage.engine import FILE_NAME, open_database
from helixflow.storage.schema import sessions
from tests.harness.auth import Person
from tests.harness.sessions import SignIns

T = TypeVar("T")
Run = Callable[[Coroutine[Any, Any, T]], T]


@dataclass
class Session:
    id: str
    began: int
    expires: int
    live: str
    used: list[str] = field(default_factory=list)
    ended: str | None = None


class Families(RuleBasedStateMachine):
    """Every example has an account of its own."""

    tokens = Bundle("tokens")

    def __init__(self, run: Run[Any], door: SignIns) -> None:
        super().__init__()
        self.run_, self.door = run, door
        self.person: Person = run(door.add_account(f"user{door.now}@example.com"))
        self.sessions: list[Session] = []

    @rule(target=tokens)
    def sign_in(self) -> tuple[int, str]:
        answer = self.run_(self.door.enter(self.person))
        now = self.door.now
        self.sessions.append(Session(answer.session_id, now, now + REFRESH_LIFE_S, answer.refresh_token))
        return len(self.sessions) - 1, answer.refresh_token

    @rule(target=tokens, token=tokens)
    def refresh(self, token: tuple[int, str]) -> Any:
        answer = self._attempt(token[1])
        return self._expect(token, answer)

    @rule(target=tokens, token=tokens)
    def refresh_twice_at_once(self, token: tuple[int, str]) -> Any:
        async def both() -> list[pb.LoginResponse | None]:
            return list(await asyncio.gather(self._refresh(token[1]), self._refresh(token[1])))

        answers = sorted(self.run_(both()), key=lambda answer: answer is None)
        fresh = self._expect(token, answers[0])
        self._expect(token, answers[1])
        return fresh

    @rule(token=tokens)
    def sign_out(self, token: tuple[int, str]) -> None:
        self.run_(self.door.ask(None, "Logout", pb.LogoutRequest(refresh_token=token[1])))
        self._end(self.sessions[token[0]], "logout")

    @rule()
    def end_all(self) -> None:
        async def end() -> None:
            async with self.door.system() as unit:
                await end_sessions(unit, self.person.id, self.person.organisation_id, EndReason.REVOKED)

        self.run_(end())
        for session in self.sessions:
            self._end(session, "revoked")

    @rule(seconds=st.sampled_from([1, 3600, REFRESH_LIFE_S - 1, REFRESH_LIFE_S, SESSION_LIFE_S // 2]))
    def wait(self, seconds: int) -> None:
        self.door.clock.advance(seconds)

    @invariant()
    def the_database_agrees(self) -> None:
        found = {row.id: row.end_reason for row in self.run_(self.door.rows(sessions, account_id=self.person.id))}
        for session in self.sessions:
            assert found[session.id] == session.ended

    def _attempt(self, token: str) -> pb.LoginResponse | None:
        return self.run_(self._refresh(token))

    async def _refresh(self, token: str) -> pb.LoginResponse | None:
        try:
            return await self.door.refresh(token)
        except HelixError as exc:
            assert exc.kind is ErrorKind.INVALID_TOKEN
            return None

    def _expect(self, token: tuple[int, str], answer: pb.LoginResponse | None) -> Any:
        number, text = token
        session, now = self.sessions[number], self.door.now
        works = session.ended is None and now < session.expires and text == session.live
        assert (answer is not None) == works
        if answer is None:
            if text in session.used:
                self._end(session, "reused")
            return multiple()
        assert answer.session_id == session.id
        session.used.append(session.live)
        session.live = answer.refresh_token
        session.expires = min(now + REFRESH_LIFE_S, session.began + SESSION_LIFE_S)
        return number, answer.refresh_token

    def _end(self, session: Session, reason: str) -> None:
        if session.ended is None and self.door.now < session.expires:
            session.ended = reason


def test_refresh_families_behave_as_the_model(migrated_sqlite: Path, tmp_path: Path) -> None:
    place = Settings(data_dir=tmp_path / "data")
    place.data_dir.mkdir(mode=0o700)
    shutil.copy(migrated_sqlite, place.data_dir / FILE_NAME)
    with asyncio.Runner() as runner:
        database = open_database(place)
        door = runner.run(SignIns.open(database))

        def machine() -> Families:
            door.clock.advance(1)
            return Families(runner.run, door)

        bounds = settings(
            max_examples=12, stateful_step_count=18, deadline=None, suppress_health_check=list(HealthCheck)
        )
        try:
            run_state_machine_as_test(machine, settings=bounds)
        finally:
            runner.run(door.close())
            runner.run(database.close())
