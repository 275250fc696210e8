"""A certificate authority for tests, and everybody's identity below it."""

from pathlib import Path
from typing import Any

from helixflow.pki.files import PkiFolder
from helixflow.pki.identity import ServiceIdentity
from helixflow.pki.issuing import Issuance
from helixflow.pki.names import HTTPS, SERVICES
from helixflow.rpc.peers import Policy
from helixflow.settings.tree import Settings


class Pki:
    """What `helixflow serve` makes under `data_dir/pki`, for all services. Takes some ten milliseconds."""

    def __init__(self, data_dir: Path, **pki: Any) -> None:
        self.settings = Settings.model_validate({"data_dir": data_dir, "pki": pki})
        self.folder = PkiFolder(self.settings.pki_dir)
        self.issuance = Issuance(self.settings)
        self.issuance.ensure((*SERVICES, HTTPS))

    def identity(self, service: str) -> ServiceIdentity:
        """A new one at each call, as every process has its own."""
        return ServiceIdentity.open(self.settings, service)


def allow(*services: str, peers: tuple[str, ...] = SERVICES) -> Policy:
    """A policy that lets `peers`, by default everybody of ours, call these gRPC services (full names)."""
    return {service: frozenset(peers) for service in services}
