"""`helixflow whoami` and `helixflow password`: one's own account."""

import typer

from helixflow.cli.administration import Json, administer, cell, show_fields
from helixflow.cli.output import print_json, print_lines
from helixflow.cli.prompts import ask_new_password, ask_secret

WHOAMI_EPILOG = "Example:\n\n$ helixflow whoami"
PASSWORD_EPILOG = "Example:\n\n$ helixflow password"  # noqa: S105  (no secret)


def whoami_command(context: typer.Context, as_json: Json = False) -> None:
    """Show as whom commands act, and what that one may do."""
    me = administer(context, lambda api: api.ask("GET", "/me"))
    if as_json:
        print_json(me)
        return
    fields = [
        ("kind", me["kind"].replace("_", " ")),
        ("organisation", me["organisation_id"]),
        ("project", cell(me["project_id"])),
        ("roles", cell(me["roles"])),
        *_permissions("may", me["permissions"]),
        ("operator", cell(me["operator"])),
    ]
    if me["email"] is not None:
        fields.append(("second factor", cell(me["mfa_enabled"])))
        fields += [("member of", f"{found['name']} ({found['organisation_id']})") for found in me["organisations"]]
    for found in me["projects"]:
        fields += _permissions(f"in {found['project_id']}", found["permissions"])
    show_fields(" ".join(filter(None, (me["name"], me["email"], f"({me['id']})"))), fields)


def _permissions(label: str, permissions: list[str]) -> list[tuple[str, str]]:
    """A line for each noun."""
    verbs: dict[str, list[str]] = {}
    for permission in permissions:
        noun, _, verb = permission.partition(":")
        verbs.setdefault(noun, []).append(verb)
    lines = [f"{noun}: {', '.join(found)}" for noun, found in verbs.items()]
    return [(label if number == 0 else "", line) for number, line in enumerate(lines or ["nothing"])]


def password_command(context: typer.Context) -> None:
    """Change your password; your other sessions end. Both are asked for, never given on the command line."""
    body = {"current_password": ask_secret("Present password"), "new_password": ask_new_password("New password")}
    administer(context, lambda api: api.ask("PUT", "/me/password", body))
    print_lines("The password is changed; your other sessions have ended.")
