"""How a gateway or control process is told what it needs: settings, sockets and pipes inherited from the launcher."""

import argparse
import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

from helixflow.core.errors import ExitCode, UserError
from helixflow.process.death import arm_death_signal, watch_life
from helixflow.settings.tree import Settings


@dataclass(frozen=True, slots=True)
class ChildArguments:
    """File descriptors on the command line of a child. `listen_fd` and `tls_listen_fd` are listening TCP sockets, for
    gateways only: plain HTTP, and HTTPS.

    All but `settings_fd` are optional, so that a process can be started by hand or by a test.
    """

    settings_fd: int
    listen_fd: int | None = None
    tls_listen_fd: int | None = None
    life_fd: int | None = None
    ready_fd: int | None = None
    name: str = ""

    @classmethod
    def parse(cls, argv: Sequence[str] | None = None) -> "ChildArguments":
        """Reads the process's (or the given) arguments; a wrong one ends the process with exit code 2."""
        parser = argparse.ArgumentParser(description="A process of HelixFlow; started by `helixflow serve`.")
        parser.add_argument("--name", default="", help="this process's name in logs")
        parser.add_argument("--settings-fd", type=int, required=True)
        for option in ("--listen-fd", "--tls-listen-fd", "--life-fd", "--ready-fd"):
            parser.add_argument(option, type=int, default=None)
        given = parser.parse_args(argv)
        return cls(given.settings_fd, given.listen_fd, given.tls_listen_fd, given.life_fd, given.ready_fd, given.name)

    def arm(self) -> None:
        """Ties this process's life to the launcher's. Call first."""
        if self.life_fd is None:
            return
        os.set_inheritable(self.life_fd, False)
        arm_death_signal()
        watch_life(self.life_fd)

    def load_settings(self) -> Settings:
        """The complete settings tree. Raises `UserError` (CONFIG) when it does not fit this version."""
        try:
            return Settings.model_validate_json(read_whole(self.settings_fd))
        except ValueError as exc:
            raise UserError(f"the settings handed over by the launcher are not valid: {exc}", ExitCode.CONFIG) from exc

    def report_ready(self) -> None:
        """Tells the launcher that this process serves. Once."""
        if self.ready_fd is None:
            return
        # A launcher that has gone is noticed by other means.
        with contextlib.suppress(BrokenPipeError):
            os.write(self.ready_fd, b"1")
        os.close(self.ready_fd)


def read_whole(fd: int) -> bytes:
    """A file from its beginning, leaving the offset that all its readers share where it was."""
    pieces = []
    offset = 0
    while piece := os.pread(fd, 1 << 16, offset):
        pieces.append(piece)
        offset += len(piece)
    return b"".join(pieces)
