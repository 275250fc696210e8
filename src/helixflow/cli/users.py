"""`helixflow users`: accounts of the organisation."""

from typing import Annotated, Any

import typer

from helixflow.cli.administration import Json, administer, part, present, show_list, show_token
from helixflow.cli.output import print_json, print_lines

app = typer.Typer(
    help="List, create, invite, suspend, reinstate, reset and delete users.",
    epilog="Example:\n\n$ helixflow users invite ada@example.com --role developer",
    no_args_is_help=True,
)
UserId = Annotated[str, typer.Argument(metavar="ID", help="Id of the user, as `users list` shows it.")]
Email = Annotated[str, typer.Argument(metavar="EMAIL", help="Their e-mail.")]


@app.command("list", epilog="Example:\n\n$ helixflow users list\n\n$ helixflow users list --email ada@example.com")
def list_command(
    context: typer.Context,
    email: Annotated[str | None, typer.Option("--email", help="Only the user with exactly this e-mail.")] = None,
    as_json: Json = False,
) -> None:
    """List the users of the organisation, newest first."""
    entries = administer(context, lambda api: api.collect("/users", {"email": email}))
    show_list("users", ("id", "email", "name", "role", "status", "mfa_enabled", "last_login_at"), entries, as_json)


@app.command("create", epilog='Example:\n\n$ helixflow users create ada@example.com --name "Ada" --role developer')
def create_command(
    context: typer.Context,
    email: Email,
    name: Annotated[str, typer.Option("--name", help="Their name.")],
    role: Annotated[str | None, typer.Option("--role", help="Their role in the organisation; default: none.")] = None,
    operator: Annotated[bool, typer.Option("--operator", help="May administer the installation.")] = False,
    as_json: Json = False,
) -> None:
    """Create an account. Its owner sets the password with a token, which is shown once."""
    body = {**present(email=email, name=name, role=role), "operator": operator}
    made = administer(context, lambda api: api.ask("POST", "/users", body))
    if as_json:
        print_json(made)
    else:
        show_token(f"Created {email} ({made['user']['id']}).", made["token"], email, made["token_expires_at"])


@app.command("invite", epilog="Example:\n\n$ helixflow users invite ada@example.com --role developer")
def invite_command(
    context: typer.Context,
    email: Email,
    role: Annotated[str, typer.Option("--role", help="The role that they get.")],
    project: Annotated[
        str | None, typer.Option("--project", metavar="ID", help="Only in this project; default: in the organisation.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Invite somebody, with or without an account."""
    body = present(email=email, role=role, project_id=project)
    made = administer(context, lambda api: api.ask("POST", "/invitations", body))
    if as_json:
        print_json(made)
    else:
        invitation = made["invitation"]
        show_token(f"Invited {email} ({invitation['id']}).", made["token"], email, invitation["expires_at"])


@app.command("suspend", epilog="Example:\n\n$ helixflow users suspend user_abc123")
def suspend_command(context: typer.Context, user_id: UserId, as_json: Json = False) -> None:
    """End a user's sessions and stop their keys, until reinstated."""
    _change(context, user_id, "suspend", "suspended", as_json)


@app.command("reinstate", epilog="Example:\n\n$ helixflow users reinstate user_abc123")
def reinstate_command(context: typer.Context, user_id: UserId, as_json: Json = False) -> None:
    """Let a suspended user in again."""
    _change(context, user_id, "reinstate", "reinstated", as_json)


@app.command("reset", epilog="Example:\n\n$ helixflow users reset user_abc123")
def reset_command(context: typer.Context, user_id: UserId, as_json: Json = False) -> None:
    """Take password and second factor away; a token, which is shown once, sets a new password."""
    made = administer(context, lambda api: api.ask("POST", f"/users/{part(user_id)}/reset"))
    if as_json:
        print_json(made)
    else:
        email = made["user"]["email"]
        show_token(f"Reset {email} ({user_id}).", made["token"], email, made["token_expires_at"])


@app.command("delete", epilog="Example:\n\n$ helixflow users delete user_abc123")
def delete_command(context: typer.Context, user_id: UserId) -> None:
    """Delete a user for good. Only the id stays, in the audit log."""
    administer(context, lambda api: api.ask("DELETE", f"/users/{part(user_id)}"))
    print_lines(f"deleted {user_id}")


def _change(context: typer.Context, user_id: str, verb: str, done: str, as_json: bool) -> None:
    user: dict[str, Any] = administer(context, lambda api: api.ask("POST", f"/users/{part(user_id)}/{verb}"))
    if as_json:
        print_json(user)
    else:
        print_lines(f"{done} {user['email']} ({user_id})")
