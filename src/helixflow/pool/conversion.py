"""Turns fetched files into GGUF by a process of its own."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from helixflow.core.errors import ExitCode, UserError
from helixflow.pool.catalogue import Conversion
from helixflow.process import shim

_TIMEOUT_S: Final = 600.0
_MODULES: Final = {"bert": "helixflow.pool.convert_bert"}


def run_conversion(conversion: Conversion, folder: Path, output: Path, descriptors: Sequence[int]) -> None:
    """Converts the files in `folder` into `output`. Raises `UserError` (MODEL, or STORAGE when the disk is full)."""
    argv = [sys.executable, "-m", _MODULES[conversion.kind], str(folder), str(output)]
    try:
        ended = subprocess.run(
            shim.command(argv, parent=os.getpid()),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_S,
            pass_fds=list(descriptors),
            start_new_session=True,
            # `python -m` looks for modules in the working folder first: never in the user's.
            cwd=folder,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise UserError(f"converting the model took longer than {_TIMEOUT_S:.0f} s", ExitCode.MODEL) from exc
    if ended.returncode != 0:
        lines = ended.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {ended.returncode}"]
        code = ExitCode.STORAGE if "No space left on device" in lines[-1] else ExitCode.MODEL
        raise UserError(f"the model cannot be converted: {lines[-1][:300]}", code)
