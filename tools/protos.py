"""Python stubs and their types from proto/: `proto/helixflow/auth/v1/auth.proto` becomes
`helixflow.rpc.generated.auth_v1.{auth_pb2, auth_pb2_grpc}`.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "proto" / "helixflow"
GENERATED = Path("src/helixflow/rpc/generated")


def write_stubs(root: Path) -> None:
    """Writes the package of stubs below `root`. Raises `RuntimeError` with protoc's words when a proto is wrong."""
    folder = root / GENERATED
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").write_text('"""Stubs generated from proto/ by `make generate`; never edited."""\n')
    for version in sorted({proto.parent for proto in PROTOS.rglob("*.proto")}):
        package = "_".join(version.relative_to(PROTOS).parts)
        _compile(version, package, root / "src")
        (folder / package / "__init__.py").write_text(
            f'"""Generated from {version.relative_to(ROOT).as_posix()}; never edited."""\n'
        )


def _compile(folder: Path, package: str, source_root: Path) -> None:
    # The proto's virtual path decides the import path of the stubs: it must be where they lie in the package.
    virtual = f"helixflow/rpc/generated/{package}"
    scripts = Path(sysconfig.get_path("scripts"))
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{virtual}={folder}"]
    command += [f"--plugin={name}={scripts / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    # `quiet` for both plugins: they report each file on standard error, where only problems belong.
    command += [f"--{kind}={source_root}" for kind in ("python_out", "grpc_python_out")]
    command += [f"--{kind}=quiet:{source_root}" for kind in ("mypy_out", "mypy_grpc_out")]
    command += [f"{virtual}/{proto.name}" for proto in sorted(folder.glob("*.proto"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise RuntimeError(f"protoc failed:\n{done.stdout}{done.stderr}")
