"""`helixflow audit`: the audit log. `verify` works on a file, without a server; the others ask the admin API."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from helixflow.cli.administration import Json, administer
from helixflow.cli.output import format_time, print_json, print_lines, print_table
from helixflow.core.errors import ExitCode, UserError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    from helixflow.auth.audit.verify import Verified

app = typer.Typer(
    help="List, export and verify the audit log.",
    epilog="Example:\n\n$ helixflow audit export --out audit.jsonl\n\n$ helixflow audit verify audit.jsonl",
    no_args_is_help=True,
)

Since = Annotated[
    str | None, typer.Option("--since", metavar="WHEN", help="From then on: 7d, 12h, 2w ago, a date or a time (UTC).")
]
Until = Annotated[str | None, typer.Option("--until", metavar="WHEN", help="Before that time.")]
Installation = Annotated[
    bool, typer.Option("--installation", help="The installation's log instead of the organisation's; for operators.")
]
_MAX_KEY_FILE = 64 * 1024


@app.command(
    "list",
    epilog="Example:\n\n$ helixflow audit list --since 7d\n\n$ helixflow audit list --outcome denied --limit 100",
)
def list_command(
    context: typer.Context,
    actor: Annotated[str | None, typer.Option("--actor", metavar="ID", help="Only what they did.")] = None,
    action: Annotated[str | None, typer.Option("--action", help="Only this, such as create_key.")] = None,
    target: Annotated[str | None, typer.Option("--target", metavar="ID", help="Only what was done to it.")] = None,
    outcome: Annotated[str | None, typer.Option("--outcome", help="Only what was done, or denied.")] = None,
    since: Since = None,
    until: Until = None,
    installation: Installation = False,
    limit: Annotated[int, typer.Option("--limit", min=1, max=10_000, help="Most records shown.")] = 20,
    as_json: Json = False,
) -> None:
    """List records, newest first."""
    from helixflow.cli.audit_api import list_records, query_of

    filters = query_of(
        since, until, installation, {"actor_id": actor, "action": action, "target_id": target, "outcome": outcome}
    )
    records = administer(context, lambda api: list_records(api, filters, limit))
    if as_json:
        print_json({"records": records})
    else:
        print_table(("when", "who", "action", "on", "outcome", "from"), [_row(record) for record in records])


@app.command(
    "export",
    epilog="Example:\n\n$ helixflow audit export --out audit.jsonl\n\n$ helixflow audit export | gzip > audit.gz",
)
def export_command(
    context: typer.Context,
    since: Since = None,
    until: Until = None,
    installation: Installation = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write it there, readable by you only.")
    ] = None,
) -> None:
    """Export the log as JSON Lines that anybody can verify. The export itself is recorded."""
    from helixflow.cli.audit_api import export_log, query_of, written_whole

    query = query_of(since, until, installation, {})
    if out is None:
        administer(context, lambda api: export_log(api, query, sys.stdout.buffer))
        return
    with written_whole(out) as file:
        administer(context, lambda api: export_log(api, query, file))


@app.command(
    "verify",
    epilog="Example:\n\n$ helixflow audit verify audit.jsonl --key audit-key.pem\n\n"
    "$ helixflow audit export | helixflow audit verify -",
)
def verify_command(
    file: Annotated[str, typer.Argument(metavar="FILE", help="An export; - for standard input.")],
    key: Annotated[
        Path | None,
        typer.Option("--key", metavar="FILE", help="Public keys (PEM or JWK) that must have signed it."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Verify an exported audit log, offline. Names the first bad record, and then exits with 1.

    Without --key the keys in the file count: that shows that nothing was changed since it was signed, not by whom.
    """
    from dataclasses import asdict

    from helixflow.auth.audit.verify import Broken, verify

    pinned = _read_keys(key) if key is not None else None
    try:
        if file == "-":
            verified = verify(sys.stdin.buffer, pinned)
        else:
            with Path(file).open("rb") as stream:
                verified = verify(stream, pinned)
    except Broken as exc:
        if not as_json:
            raise UserError(f"{'standard input' if file == '-' else file}: {exc}") from exc
        print_json({"valid": False, "line": exc.line, "sequence": exc.sequence, "problem": exc.problem})
        return ExitCode.FAILURE
    if as_json:
        kids = sorted(verified.kids)
        print_json({"valid": True, **asdict(verified), "kids": kids, "key_pinned": pinned is not None})
    else:
        _print_verified(verified, pinned=pinned is not None)
    return ExitCode.OK


def _row(record: dict[str, Any]) -> tuple[str, ...]:
    who = record["actor_name"] or record["actor_id"] or record["actor_kind"]
    target = " ".join(record[name] for name in ("target_kind", "target_id") if record[name])
    outcome = record["outcome"] if not record["reason"] else f"{record['outcome']} ({record['reason']})"
    return (record["at"], who, record["action"], target, outcome, record["address"] or "")


def _read_keys(path: Path) -> "dict[str, EllipticCurvePublicKey]":
    from helixflow.auth.audit.signatures import parse_public_keys

    try:
        with path.open("rb") as file:
            return parse_public_keys(_read_bounded(file))
    except ValueError as exc:
        raise UserError(f"--key {path}: {exc}", ExitCode.USAGE) from exc


def _read_bounded(file: BinaryIO) -> bytes:
    content = file.read(_MAX_KEY_FILE + 1)
    if len(content) > _MAX_KEY_FILE:
        raise ValueError("too large for a file of keys")
    return content


def _print_verified(verified: "Verified", *, pinned: bool) -> None:
    whose = verified.organisation_id or "the installation"
    span = f"records {verified.first} to {verified.last}" if verified.records else "no records"
    print_lines(
        f"verified: {span} of {whose}, {verified.checkpoints} checkpoints, "
        f"exported {format_time(verified.exported_at)}",
        f"ends with record {verified.last}, hash {verified.head_hash}",
        f"signed with {', '.join(sorted(verified.kids))}",
    )
    if not pinned:
        print_lines(
            "The key came with the file: nothing was changed since it was signed, but by whom is not shown.",
            "Keep the key apart and give it with --key.",
        )
