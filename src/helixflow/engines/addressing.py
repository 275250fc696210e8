"""Where a replica is reached: on this node directly, on another one through the data port of its pool."""

from helixflow.core.capacity import Replica
from helixflow.transport.origin import Origin


def origin_of(replica: Replica) -> Origin:
    """The key of the connections to `replica`; those to other nodes are TLS with the gateway's identity."""
    if replica.server_name:
        return Origin("https", replica.host, replica.port, replica.server_name)
    return Origin("http", replica.host, replica.port)
