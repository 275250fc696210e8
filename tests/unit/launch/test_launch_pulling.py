import io
from pathlib import Path

import pytest

from helixflow.core.errors import ExitCode, UserError
from helixflow.launch.pulling import pull_all
from helixflow.pool.catalogue import ModelSpec
from helixflow.pool.manifest import StoredModel
from helixflow.pool.progress import PullProgress, Report

SPEC = ModelSpec("m", "file:/m.gguf", "chat")
MODEL = StoredModel("m", "file:/m.gguf", "a" * 64, Path("/m.gguf"), 1, "", 0, "chat", None, 0.0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Store:
    """Reports a download in 1,000 steps, then fails if asked to."""

    def __init__(self, error: UserError | None = None) -> None:
        self._error = error

    def pull(self, spec: ModelSpec, report: Report) -> StoredModel:
        for step in range(1001):
            report(PullProgress("downloading", step * 1000, 1_000_000))
        report(PullProgress("verifying", 0, None))
        if self._error is not None:
            raise self._error
        return MODEL


def test_without_a_terminal_progress_is_a_few_lines() -> None:
    out = io.StringIO()
    assert pull_all(Store(), [SPEC], stream=out) == [MODEL]  # type: ignore[arg-type]
    lines = out.getvalue().splitlines()
    assert lines[0] == "m: downloading 0 % of 1 MB"
    assert lines[-2:] == ["m: downloading 100 % of 1 MB", "m: verifying"]
    assert len(lines) == 7


def test_a_terminal_gets_a_bar() -> None:
    out = Terminal()
    pull_all(Store(), [SPEC], stream=out)  # type: ignore[arg-type]
    assert "m: " in out.getvalue()
    assert "\x1b[" in out.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_a_pull_that_fails_says_so_to_the_caller(stream: io.StringIO) -> None:
    error = UserError("no space left", ExitCode.STORAGE)
    with pytest.raises(UserError, match="no space left"):
        pull_all(Store(error), [SPEC], stream=stream)  # type: ignore[arg-type]
