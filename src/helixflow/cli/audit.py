"""`helixflow audit`: the audit log. `verify` works on a file, without a server."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from helixflow.cli.output import format_time, print_json, print_lines
from helixflow.core.errors import ExitCode, UserError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    from helixflow.auth.audit.verify import Verified

app = typer.Typer(
    help="List, export and verify the audit log.",
    epilog="Example:\n\n$ helixflow audit export --out audit.jsonl\n\n$ helixflow audit verify audit.jsonl",
    no_args_is_help=True,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_MAX_KEY_FILE = 64 * 1024


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
