import subprocess
import sys


def test_the_launcher_loads_neither_asyncio_nor_grpc_nor_pydantic() -> None:
    heavy = ("asyncio", "grpc", "pydantic", "structlog", "sqlalchemy", "uvloop", "xllamacpp")
    program = f"import sys, helixflow.launch.launcher; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_describing_a_child_does_not_load_llama_cpp() -> None:
    program = "import sys, helixflow.engines.llama_cpp.command; print('xllamacpp' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"
