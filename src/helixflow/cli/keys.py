"""`helixflow keys`: API keys, through the admin API."""

import time
from typing import Annotated, Any

import typer

from helixflow.cli.administration import Json, Project, administer, cell, part, present, show_fields
from helixflow.cli.moments import parse_expiry, parse_span, rfc3339
from helixflow.cli.output import print_json, print_lines, print_table
from helixflow.core.errors import ExitCode, UserError

app = typer.Typer(
    help="Create, list, show, change, rotate and revoke API keys; the service must be running.",
    epilog="Example:\n\n$ helixflow keys create laptop --expires 30d",
    no_args_is_help=True,
)

KeyId = Annotated[str, typer.Argument(metavar="KEY_ID", help="Id of the key, as `keys list` shows it.")]
Models = Annotated[list[str] | None, typer.Option("--model", metavar="NAME", help="Only this model. Several times.")]
Networks = Annotated[
    list[str] | None, typer.Option("--network", metavar="CIDR", help="Only from this network. Several times.")
]
Priority = Annotated[
    int | None, typer.Option("--priority", help="-10 to 10: waiting requests go before those of lower ones.")
]
Weight = Annotated[
    int | None, typer.Option("--weight", help="1 to 10000, usually 100: share in the organisation when requests wait.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the key and nothing else.")]


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
    models: Models = None,
    networks: Networks = None,
    priority: Priority = None,
    weight: Weight = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Create an API key. It is shown once and cannot be had again."""
    expires_at = rfc3339(parse_expiry(expires, time.time())) if expires is not None else None
    body = present(
        name=name,
        project_id=project,
        owner_id=owner,
        scopes=scopes or None,
        models=models or None,
        networks=networks or None,
        expires_at=expires_at,
        priority=priority,
        weight=weight,
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


@app.command("show", epilog="Example:\n\n$ helixflow keys show key_abc123")
def show_command(context: typer.Context, key_id: KeyId, as_json: Json = False) -> None:
    """Show a key and its restrictions, without its secret."""
    _show(administer(context, lambda api: api.ask("GET", f"/keys/{part(key_id)}")), as_json)


@app.command(
    "update",
    epilog="Example:\n\n$ helixflow keys update key_abc123 --network 10.1.0.0/16 --network 10.2.0.0/16\n\n"
    "$ helixflow keys update key_abc123 --all-models --expires never",
)
def update_command(
    context: typer.Context,
    key_id: KeyId,
    name: Annotated[str | None, typer.Option("--name", help="Its new name.")] = None,
    scopes: Annotated[
        list[str] | None, typer.Option("--scope", metavar="NOUN:VERB", help="What it may do. Several times.")
    ] = None,
    models: Models = None,
    all_models: Annotated[bool, typer.Option("--all-models", help="Any model again.")] = False,
    networks: Networks = None,
    all_networks: Annotated[bool, typer.Option("--all-networks", help="From everywhere again.")] = False,
    expires: Annotated[
        str | None, typer.Option("--expires", help="30d, 12h, 2w, a date (2027-01-31), a time in UTC, or never.")
    ] = None,
    priority: Priority = None,
    weight: Weight = None,
    as_json: Json = False,
) -> None:
    """Change a key, everywhere within a second. What is given replaces what was; the rest stays."""
    if (all_models and models) or (all_networks and networks):
        raise UserError("give either a restriction or the option that lifts it", ExitCode.USAGE)
    body = present(
        name=name,
        scopes=scopes or None,
        models=[] if all_models else models or None,
        networks=[] if all_networks else networks or None,
        priority=priority,
        weight=weight,
    )
    if expires is not None:
        never = expires.strip().lower() == "never"
        body["expires_at"] = None if never else rfc3339(parse_expiry(expires, time.time()))
    if not body:
        raise UserError("say what changes; see: helixflow keys update --help", ExitCode.USAGE)
    _show(administer(context, lambda api: api.ask("PATCH", f"/keys/{part(key_id)}", body)), as_json)


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


def _show(key: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(_as_dict(key))
        return
    show_fields(
        f"{key['name']} ({key['id']})",
        [
            ("key", key["hint"]),
            ("state", _state(key)),
            ("project", key["project_id"]),
            ("acts for", key["owner_id"] or "the project itself"),
            ("may", cell(key["scopes"])),
            ("models", cell(key["models"]) or "all"),
            ("networks", cell(key["networks"]) or "all"),
            ("created", f"{cell(key['created_at'])} by {key['created_by']}"),
        ],
    )


def _as_dict(key: dict[str, Any]) -> dict[str, Any]:
    """As the API shows it, with its state in a word."""
    return {"key_id": key["id"], **key, "state": _state(key).split(" ")[0]}


def _state(key: dict[str, Any]) -> str:
    if key["revoked_at"]:
        return "revoked"
    # Both are RFC 3339 in UTC to the second: the order of texts is that of times.
    if key["expires_at"] and key["expires_at"] <= rfc3339(int(time.time())):
        return "expired"
    return f"valid ({_expiry(key)})"


def _expiry(key: dict[str, Any]) -> str:
    return f"expires {cell(key['expires_at'])}" if key["expires_at"] else "does not expire"
