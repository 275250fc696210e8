"""A stand-in for vLLM, for tests that have none."""

import sys
from pathlib import Path

_FOLDER = Path(__file__).parent


def write_python(folder: Path) -> Path:
    """The Python of an environment that has it, as a script in `folder`."""
    path = folder / "python-with-vllm"
    here = f"{_FOLDER}:{_FOLDER.parents[2]}"
    path.write_text(f'#!/bin/sh\nPYTHONPATH="{here}" exec "{sys.executable}" "$@"\n')
    path.chmod(0o755)
    return path
