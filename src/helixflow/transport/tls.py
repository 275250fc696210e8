"""TLS towards upstreams: always verified, never below 1.2."""

import ssl
from pathlib import Path


def client_context(ca_file: Path | None = None) -> ssl.SSLContext:
    """A context that trusts the system's certificate authorities, or only those in `ca_file` (PEM).

    Loading them takes tens of milliseconds: build it once, at start. Raises `ValueError` naming the file.
    """
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except OSError as exc:
        raise ValueError(f"cannot use the CA file {ca_file}: {exc.strerror or 'it holds no PEM certificate'}") from exc
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context
