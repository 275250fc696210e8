"""The auth service alone: `python -m benchmarks.auth_server SETTINGS` (a JSON file); prints 0 once it listens."""

import argparse
import asyncio
import signal
import sys
from pathlib import Path

import uvloop

from helixflow.auth.service import create_auth
from helixflow.pki.identity import ServiceIdentity
from helixflow.rpc.servers import create_server, listen
from helixflow.rpc.sockets import prepare_run_dir, socket_path
from helixflow.settings.tree import Settings
from helixflow.telemetry.logs import configure_logging

SERVICE = "helixflow.auth.v1.IdentityService"


async def serve(settings: Settings) -> None:
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    prepare_run_dir(settings.run_dir)
    services = await create_auth(settings, None)
    identity = ServiceIdentity.open(settings, "control")
    server = create_server(identity, {SERVICE: frozenset({"gateway"})})
    running = asyncio.create_task(services.run())
    try:
        services.register(server)
        await listen(server, socket_path(settings.run_dir, "control"), identity)
        await server.start()
        print(0, flush=True)
        await stopping.wait()
    finally:
        running.cancel()
        await asyncio.wait((running,))
        await services.close()
        await server.stop(0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.auth_server", description=__doc__)
    parser.add_argument("settings", type=Path, help="JSON file")
    arguments = parser.parse_args()
    configure_logging("warning", "text", service="auth")
    uvloop.run(serve(Settings.model_validate_json(arguments.settings.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
