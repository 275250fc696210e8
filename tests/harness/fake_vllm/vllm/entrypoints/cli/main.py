"""Stands in for `vllm serve`: the same command line and API, and processes of its own that do nothing for ever."""

import argparse
import asyncio
import os
import subprocess
import sys

from tests.harness.vllm_server import VllmServer

SLEEP = "import time; time.sleep(3600)"
# The core starts a worker, as vLLM's does.
CORE = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEP!r}])"


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("serve", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--max-model-len", type=int, required=True)
    return parser.parse_known_args()[0]


async def main() -> None:
    given = read_arguments()
    if given.model == "broken":
        sys.exit("ValueError: there is no such model")
    subprocess.Popen([sys.executable, "-c", CORE])
    server = VllmServer(
        context=given.max_model_len,
        key=os.environ["VLLM_API_KEY"],
        models=[given.served_model_name],
        port=given.port,
    )
    async with server:
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
