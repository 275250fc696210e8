"""Ports for servers that somebody else starts, and perhaps starts again."""

import random
import socket
from contextlib import closing

# Below what kernels give to clients: there, any connection of the machine may take the port of a server that is just
# being started again, and a client that calls for it in vain can even reach itself.
_RANGE = range(12_000, 32_000)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    while True:
        port = random.choice(_RANGE)
        with closing(socket.socket()) as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
