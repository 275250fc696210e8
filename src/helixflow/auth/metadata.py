"""What a call says beside its request: who asks, from where."""

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import unquote

import grpc

from helixflow.auth.caller import Source
from helixflow.rpc.access import AUTHORIZATION, CLIENT_ADDRESS, CLIENT_SOFTWARE, REQUEST_ID

_MAX_CHARS: Final = 256


def texts_of(context: grpc.aio.ServicerContext[Any, Any]) -> dict[str, str]:
    """The call's metadata; a name that comes twice is as good as absent."""
    found: dict[str, str] = {}
    repeated = set()
    for name, value in context.invocation_metadata() or ():
        if isinstance(value, str):
            if name in found:
                repeated.add(name)
            found[name] = value
    for name in repeated:
        del found[name]
    return found


def credential_of(metadata: Mapping[str, str]) -> str:
    """The token or key, '' for none."""
    scheme, _, credential = metadata.get(AUTHORIZATION, "").strip().partition(" ")
    return credential.strip() if scheme.lower() == "bearer" else ""


def source_of(metadata: Mapping[str, str]) -> Source:
    """What the admin API says of its client."""
    return Source(
        metadata.get(CLIENT_ADDRESS, "")[:_MAX_CHARS],
        metadata.get(REQUEST_ID, "")[:_MAX_CHARS],
        unquote(metadata.get(CLIENT_SOFTWARE, ""))[:_MAX_CHARS],
    )
