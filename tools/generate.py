"""Writes everything in the repository that is generated: `python -m tools.generate [--check]`.

`--check` generates into a temporary folder, compares, names what is stale and exits 1.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tools.cli_page import write_cli_page
from tools.common_passwords import write_common_passwords
from tools.errors_page import write_errors_page
from tools.protos import GENERATED, write_stubs
from tools.roles_page import write_roles_page
from tools.settings_page import write_settings_page

ROOT = Path(__file__).resolve().parent.parent

# Each writes its files below the folder it is given, laid out as in the repository.
GENERATORS: tuple[Callable[[Path], None], ...] = (
    write_stubs,
    write_settings_page,
    write_cli_page,
    write_errors_page,
    write_roles_page,
    write_common_passwords,
)
# Folders in which every file is generated: what is there and is not generated any more is stale too.
OWNED_FOLDERS = (GENERATED,)


def generate(root: Path) -> None:
    """Writes all generated files below `root`."""
    for write in GENERATORS:
        write(root)


def stale_files(fresh: Path, root: Path) -> list[Path]:
    """Paths, relative to `root`, that differ from what was generated below `fresh`, are missing or left over."""
    wanted = {path.relative_to(fresh) for path in _files(fresh)}
    leftover = {path.relative_to(root) for folder in OWNED_FOLDERS for path in _files(root / folder)} - wanted
    changed = {
        path
        for path in wanted
        if not (root / path).is_file() or (root / path).read_bytes() != (fresh / path).read_bytes()
    }
    return sorted(changed | leftover)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a generated file is stale")
    check = parser.parse_args(arguments).check
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        generate(fresh)
        stale = stale_files(fresh, ROOT)
        for path in stale:
            if check:
                sys.stderr.write(f"{path}: stale; run make generate\n")
            elif (fresh / path).is_file():
                (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
                (ROOT / path).write_bytes((fresh / path).read_bytes())
                sys.stdout.write(f"wrote {path}\n")
            else:
                (ROOT / path).unlink()
                sys.stdout.write(f"removed {path}\n")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
