import subprocess
import sys

import pytest

HEAVY = ("sqlalchemy", "alembic", "typer", "fastapi", "starlette", "aiosqlite", "asyncpg", "argon2")


@pytest.mark.parametrize(
    "module",
    [
        "helixflow.clients.keys",
        "helixflow.clients.tokens",
        "helixflow.clients.pool",
        "helixflow.rpc",
        "helixflow.rpc.channels",
        "helixflow.launch.gateway",
    ],
)
def test_what_the_gateway_imports_stays_light(module: str) -> None:
    program = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
