"""`helixflow keys`: API keys, through the admin API."""

import re
import time
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from helixflow.cli.administration import Json, Project, administer, cell, part, present
from helixflow.cli.output import print_json, print_lines, print_table
from helixflow.core.errors import ExitCode, UserError

app = typer.Typer(
    help="Create, list, rotate and revoke API keys; the service must be running.",
    epilog="Example:\n\n$ helixflow keys create laptop --expires 30d",
    no_args_is_help=True,
)

KeyId = Annotated[str, typer.Argument(metavar="KEY_ID", help="Id of the key, as `keys list` shows it.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the key and nothing else.")]

_SPAN = re.compile(r"([0-9]{1,6})([hdw])")
_SPAN_S = {"h": 3600, "d": 86_400, "w": 7 * 86_400}


@app.command(
    "create",
    epilog="Example:\n\n$ helixflow keys create laptop\n\n$ helixflow keys create ci --expires 30d --quiet > ci.key",
)
def create_command(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the key is for.")],
    expires: Annotated[
        str | None, typer.Option("--expires", help="30d, 12h, 2w, or a date (2027-01-31) or time in UTC.")
    ] = None,
    project: Annotated[
        str | None, typer.Option("--project", metavar="ID", help="Its project; default: that of your credential.")
    ] = None,
    owner: Annotated[
        str | None, typer.Option("--owner", metavar="ID", help="Whom it acts for: you, or a service account.")
    ] = None,
    scopes: Annotated[
        list[str] | None,
        typer.Option("--scope", metavar="NOUN:VERB", help="What it may do; default: use models. Several times."),
    ] = None,
    models: Annotated[
        list[str] | None, typer.Option("--model", metavar="NAME", help="Only this model. Several times.")
    ] = None,
    networks: Annotated[
        list[str] | None, typer.Option("--network", metavar="CIDR", help="Only from this network. Several times.")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Create an API key. It is shown once and cannot be had again."""
    expires_at = _rfc3339(parse_expiry(expires, time.time())) if expires is not None else None
    body = present(
        name=name,
        project_id=project,
        owner_id=owner,
        scopes=scopes or None,
        models=models or None,
        networks=networks or None,
        expires_at=expires_at,
    )
    made = administer(context, lambda api: api.ask("POST", "/keys", body))
    _show_secret("Created", made, quiet, as_json)


@app.command("list", epilog="Example:\n\n$ helixflow keys list\n\n$ helixflow keys list --json")
def list_command(context: typer.Context, project: Project = None, as_json: Json = False) -> None:
    """List all keys that you may see, newest first, without their secrets."""
    keys = administer(context, lambda api: api.collect("/keys", {"project_id": project}))
    if as_json:
        print_json({"keys": [_as_dict(key) for key in keys]})
        return
    print_table(
        ("id", "name", "key", "created", "state"),
        [(key["id"], key["name"], key["hint"], cell(key["created_at"]), _state(key)) for key in keys],
    )


@app.command("rotate", epilog="Example:\n\n$ helixflow keys rotate key_abc123 --overlap 12h")
def rotate_command(
    context: typer.Context,
    key_id: KeyId,
    overlap: Annotated[
        str, typer.Option("--overlap", help="How long the old key still works: 12h, 7d; 0h: not.")
    ] = "1d",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Replace a key by a new one with the same restrictions."""
    body = {"overlap_s": parse_span(overlap, "--overlap")}
    made = administer(context, lambda api: api.ask("POST", f"/keys/{part(key_id)}/rotate", body))
    _show_secret("Rotated", made, quiet, as_json)


@app.command("revoke", epilog="Example:\n\n$ helixflow keys revoke key_abc123")
def revoke_command(context: typer.Context, key_id: KeyId, as_json: Json = False) -> None:
    """Revoke a key for good; it stops working within a second."""
    key = administer(context, lambda api: api.ask("POST", f"/keys/{part(key_id)}/revoke"))
    if as_json:
        print_json(_as_dict(key))
    else:
        print_lines(f"revoked {key['name']} ({key['id']})")


def parse_expiry(text: str, now: float) -> int:
    """Epoch seconds for `30d`, `12h`, `2w`, a date or a time (UTC unless it says otherwise). Raises `UserError`."""
    if (match := _SPAN.fullmatch(text.strip().lower())) is not None:
        at = int(now) + int(match[1]) * _SPAN_S[match[2]]
    else:
        try:
            moment = datetime.fromisoformat(text.strip())
            at = int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
        except (ValueError, OverflowError) as exc:
            raise UserError(
                f"--expires {text!r}: give a span (30d, 12h, 2w), a date (2027-01-31) or a time", ExitCode.USAGE
            ) from exc
    if at <= now:
        raise UserError(f"--expires {text!r}: lies in the past", ExitCode.USAGE)
    if at > 253_402_300_799:
        raise UserError(f"--expires {text!r}: lies after the year 9999; leave it out for never", ExitCode.USAGE)
    return at


def parse_span(text: str, option: str) -> int:
    """Seconds for `12h`, `7d` or `2w`. Raises `UserError`."""
    match = _SPAN.fullmatch(text.strip().lower())
    if match is None:
        raise UserError(f"{option} {text!r}: give a span such as 12h, 7d or 2w", ExitCode.USAGE)
    return int(match[1]) * _SPAN_S[match[2]]


def _rfc3339(epoch_s: int) -> str:
    return datetime.fromtimestamp(epoch_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _show_secret(done: str, made: dict[str, Any], quiet: bool, as_json: bool) -> None:
    key, secret = made["key"], made["secret"]
    if as_json:
        replaced = {"replaced": _as_dict(made["replaced"])} if "replaced" in made else {}
        print_json({**_as_dict(key), "key": secret, **replaced})
    elif quiet:
        print_lines(secret)
    else:
        print_lines(
            f"{done} {key['name']} ({key['id']}), {_expiry(key)}.",
            "",
            f"  {secret}",
            "",
            "Keep it now: it cannot be shown again.",
        )
        if "replaced" in made:
            print_lines(f"The old key ({made['replaced']['id']}): {_state(made['replaced'])}.")


def _as_dict(key: dict[str, Any]) -> dict[str, Any]:
    """As the API shows it, with its state in a word."""
    return {"key_id": key["id"], **key, "state": _state(key).split(" ")[0]}


def _state(key: dict[str, Any]) -> str:
    if key["revoked_at"]:
        return "revoked"
    # Both are RFC 3339 in UTC to the second: the order of texts is that of times.
    if key["expires_at"] and key["expires_at"] <= _rfc3339(int(time.time())):
        return "expired"
    return f"valid ({_expiry(key)})"


def _expiry(key: dict[str, Any]) -> str:
    return f"expires {cell(key['expires_at'])}" if key["expires_at"] else "does not expire"
