"""`helixflow roles`: the built-in roles and the organisation's own."""

from typing import Annotated

import typer

from helixflow.cli.administration import Json, administer, part, show_list
from helixflow.cli.output import print_json, print_lines

app = typer.Typer(
    help="List, show, create and delete roles.",
    epilog="Example:\n\n$ helixflow roles create key-keeper --permission keys:read --permission keys:revoke",
    no_args_is_help=True,
)
RoleId = Annotated[str, typer.Argument(metavar="ID", help="Id of the role; of a built-in role its name.")]


@app.command("list", epilog="Example:\n\n$ helixflow roles list")
def list_command(context: typer.Context, as_json: Json = False) -> None:
    """List all roles: built-in ones first."""
    entries = administer(context, lambda api: api.collect("/roles"))
    show_list("roles", ("id", "name", "built_in", "description"), entries, as_json)


@app.command("show", epilog="Example:\n\n$ helixflow roles show developer")
def show_command(context: typer.Context, role_id: RoleId, as_json: Json = False) -> None:
    """Show what a role permits."""
    role = administer(context, lambda api: api.ask("GET", f"/roles/{part(role_id)}"))
    if as_json:
        print_json(role)
    else:
        print_lines(f"{role['name']}: {role['description']}", *(f"  {name}" for name in role["permissions"]))


@app.command("create", epilog="Example:\n\n$ helixflow roles create key-keeper --permission keys:read")
def create_command(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Lower-case letters, digits, - and _.")],
    permissions: Annotated[
        list[str], typer.Option("--permission", metavar="NOUN:VERB", help="What it permits; give it several times.")
    ],
    description: Annotated[str, typer.Option("--description", help="What it is for.")] = "",
    as_json: Json = False,
) -> None:
    """Create a role of the organisation's own."""
    body = {"name": name, "description": description, "permissions": permissions}
    made = administer(context, lambda api: api.ask("POST", "/roles", body))
    if as_json:
        print_json(made)
    else:
        print_lines(f"Created {made['name']} ({made['id']}).")


@app.command("delete", epilog="Example:\n\n$ helixflow roles delete role_abc123")
def delete_command(context: typer.Context, role_id: RoleId) -> None:
    """Delete a role of the organisation's own that nobody has."""
    administer(context, lambda api: api.ask("DELETE", f"/roles/{part(role_id)}"))
    print_lines(f"deleted {role_id}")
