"""What the shipper tells about itself: counted while it works, written to a file for the gateways' metrics."""

from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

FILE_NAME: Final = "shipper.json"


class ShipperStatus(Struct, frozen=True):
    """The content of `run/shipper.json`, of which older ones have less.

    `backlog_bytes` is what lies in journals and the ledger has not acknowledged, `backlog_records` how many records
    that is by the mean size of those read so far. `oldest_unshipped_s` is how long the oldest of them has waited; 0
    without one. `shipped_rows`, `interrupted`, `quarantined` and `orphaned` (settlements without an admission that can
    be read) count since the shipper began. `last_error` is the code of the outage or refusal that lasts, else empty.
    """

    at_ms: int = 0
    journals: int = 0
    backlog_records: int = 0
    backlog_bytes: int = 0
    oldest_unshipped_s: float = 0.0
    shipped_rows: int = 0
    interrupted: int = 0
    quarantined: int = 0
    orphaned: int = 0
    last_error: str = ""


class JournalFigures:
    """Of one journal: what there is of it, positions from `begin` to `end`, and what the ledger has `acknowledged`.

    `waiting_since` is of what was read and is not acknowledged, seconds since the epoch.
    """

    def __init__(self) -> None:
        self.acknowledged = 0
        self.begin = 0
        self.end = 0
        self.waiting_since: float | None = None
        self.refused_code = ""

    @property
    def backlog_bytes(self) -> int:
        return max(0, self.end - max(self.begin, self.acknowledged))


class Figures:
    """Of all journals. `journals` has those that are being shipped, by id."""

    def __init__(self) -> None:
        self.journals: dict[str, JournalFigures] = {}
        self.read_records = 0
        self.read_bytes = 0
        self.shipped_rows = 0
        self.interrupted = 0
        self.quarantined = 0
        self.orphaned = 0

    def status(self, now: float, failing_code: str) -> ShipperStatus:
        """As of `now`, seconds since the epoch; `failing_code` of an outage comes before refusals."""
        backlog = sum(journal.backlog_bytes for journal in self.journals.values())
        waiting = [journal for journal in self.journals.values() if journal.backlog_bytes]
        since = [journal.waiting_since for journal in waiting if journal.waiting_since is not None]
        refused = [journal.refused_code for journal in self.journals.values() if journal.refused_code]
        return ShipperStatus(
            at_ms=int(now * 1000),
            journals=len(self.journals),
            backlog_records=-(-backlog * self.read_records // self.read_bytes) if self.read_bytes else 0,
            backlog_bytes=backlog,
            oldest_unshipped_s=max(0.0, round(now - min(since), 3)) if since else 0.0,
            shipped_rows=self.shipped_rows,
            interrupted=self.interrupted,
            quarantined=self.quarantined,
            orphaned=self.orphaned,
            last_error=failing_code or (refused[0] if refused else ""),
        )


def write_status(run_dir: Path, status: ShipperStatus) -> None:
    """Replaces the file as a whole. Blocks; raises `OSError`. Not synced to disk: it is of the moment."""
    draft = run_dir / f".{FILE_NAME}.new"
    draft.write_bytes(msgspec.json.encode(status))
    draft.chmod(0o600)
    draft.replace(run_dir / FILE_NAME)


def read_status(run_dir: Path) -> ShipperStatus | None:
    """None while there is no such file, or none that can be understood. Blocks."""
    try:
        return msgspec.json.decode((run_dir / FILE_NAME).read_bytes(), type=ShipperStatus)
    except (OSError, msgspec.DecodeError):
        return None
