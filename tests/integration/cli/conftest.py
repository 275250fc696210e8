"""Runs the command line in this process, with an environment and a data directory of its own."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from helixflow.cli.main import main


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in tuple(os.environ):
        if name.startswith("HELIXFLOW_") or name == "OPENAI_API_KEY":
            monkeypatch.delenv(name)
    folder = tmp_path / "data"
    monkeypatch.setenv("HELIXFLOW_DATA_DIR", str(folder))
    # It would bind every logger of this process to a stream that closes with the test.
    monkeypatch.setattr("helixflow.telemetry.logs.configure_logging", lambda *_args, **_options: None)
    return folder


@pytest.fixture
def run(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*words: str) -> Outcome:
        capsys.readouterr()
        code = main(list(words))
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run
