"""`helixflow doctor` asks the running service for its health, over mutual TLS as everybody does."""

import asyncio
from pathlib import Path

from grpc_health.v1 import health_pb2

from helixflow.cli.installation import check_services
from helixflow.rpc.servers import add_health_and_reflection, create_server, listen
from helixflow.rpc.sockets import prepare_run_dir, socket_path
from tests.harness.pki import Pki


async def test_health_is_asked_for_and_believed(tmp_path: Path) -> None:
    pki = Pki(tmp_path / "data")
    settings = pki.settings
    prepare_run_dir(settings.run_dir)
    assert "not running" in check_services(settings).message
    identity = pki.identity("control")
    server = create_server(identity, {})
    health = await add_health_and_reflection(server, [])
    await listen(server, socket_path(settings.run_dir, "control"), identity)
    await server.start()
    try:
        found = await asyncio.to_thread(check_services, settings)
        assert (found.status, found.running) == ("ok", True)
        await health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        found = await asyncio.to_thread(check_services, settings)
        assert (found.status, found.running) == ("problem", True)
        assert "not serving" in found.message.replace("_", " ")
        pki.folder.service_file("monitoring").unlink()
        found = await asyncio.to_thread(check_services, settings)
        assert "monitoring.pem" in found.message
    finally:
        await server.stop(0)
