"""The reference: a bare ASGI app under the gateway's uvicorn settings that forwards the body with the gateway's HTTP
client and does nothing else. `python -m benchmarks.bare_app --upstream http://127.0.0.1:PORT`; prints the port it took.
"""

import argparse
import socket
import sys
from typing import Any

import uvicorn
import uvloop

from benchmarks.processes import pin
from helixflow.transport.client import HttpClient, Timeouts, build_head
from helixflow.transport.origin import Origin

MAX_ANSWER_BYTES = 64 * 2**20


class BareApp:
    """ASGI. Forwards every POST to the upstream's chat completions."""

    def __init__(self, upstream: str) -> None:
        self._origin, path = Origin.parse(upstream)
        headers = [("content-type", "application/json"), ("authorization", "Bearer bench")]
        self._head = build_head("POST", f"{path}/v1/chat/completions", self._origin, headers)
        self._client = HttpClient(max_connections=4096)
        self._timeouts = Timeouts()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        body = message["body"]
        if message["more_body"]:
            parts = [body]
            while message["more_body"]:
                message = await receive()
                parts.append(message["body"])
            body = b"".join(parts)
        response = await self._client.request(self._origin, self._head, body, timeouts=self._timeouts)
        try:
            headers = [(b"content-type", response.headers[b"content-type"])]
            length = response.headers.get(b"content-length")
            if length is not None:
                headers.append((b"content-length", length))
                answer = await response.read_all(MAX_ANSWER_BYTES)
                await send({"type": "http.response.start", "status": response.status, "headers": headers})
                await send({"type": "http.response.body", "body": answer})
                return
            await send({"type": "http.response.start", "status": response.status, "headers": headers})
            while piece := await response.read():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            response.close()


async def serve(upstream: str, port: int) -> None:
    listener = socket.create_server(("127.0.0.1", port), backlog=4096)
    config = uvicorn.Config(
        BareApp(upstream),
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=75,
        backlog=4096,
    )
    print(listener.getsockname()[1], flush=True)
    await uvicorn.Server(config).serve(sockets=[listener])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--core", type=int)
    arguments = parser.parse_args()
    pin(arguments.core)
    uvloop.run(serve(arguments.upstream, arguments.port))
    return 0


if __name__ == "__main__":
    sys.exit(main())
