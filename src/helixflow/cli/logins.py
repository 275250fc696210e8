"""Sessions of `helixflow login`, in a file that only the user can read."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from helixflow.core.errors import ExitCode, UserError

FILE_NAME: Final = "logins.json"


class Login(msgspec.Struct, frozen=True):
    """The tokens of one session, and until when they work (seconds since the epoch)."""

    email: str
    access_token: str
    access_expires_at: float
    refresh_token: str
    refresh_expires_at: float


_decoder = msgspec.json.Decoder(dict[str, Login])


class Logins:
    """All sessions of this user, by the URL of the server. Change them only within `locked`: a refresh token that two
    commands use at once would end its session.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / FILE_NAME

    def find(self, root_url: str) -> Login | None:
        return self._read().get(root_url)

    def keep(self, root_url: str, login: Login) -> None:
        self._write({**self._read(), root_url: login})

    def forget(self, root_url: str) -> None:
        logins = self._read()
        if logins.pop(root_url, None) is not None:
            self._write(logins)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Other commands wait. The system lets go when the process ends, however it does."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self._folder / ".logins.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _read(self) -> dict[str, Login]:
        try:
            return _decoder.decode(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        except msgspec.DecodeError as exc:
            raise UserError(f"{self._path}: is damaged; remove it and sign in again", ExitCode.CONFIG) from exc

    def _write(self, logins: dict[str, Login]) -> None:
        draft = self._path.with_name(f".{FILE_NAME}.{os.getpid()}")
        draft.unlink(missing_ok=True)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode(logins))
            file.flush()
            os.fsync(descriptor)
        draft.replace(self._path)
