"""`helixflow members`: which role a user has, in the organisation or in one project."""

from typing import Annotated

import typer

from helixflow.cli.administration import Json, administer, part, show_list
from helixflow.cli.output import print_json, print_lines

app = typer.Typer(
    help="List members, give roles and take them away.",
    epilog="Example:\n\n$ helixflow members set user_abc123 --role developer --project proj_abc123",
    no_args_is_help=True,
)
UserId = Annotated[str, typer.Argument(metavar="USER_ID", help="Id of the user, as `users list` shows it.")]
Where = Annotated[
    str | None, typer.Option("--project", metavar="ID", help="In this project; default: in the organisation itself.")
]


@app.command("list", epilog="Example:\n\n$ helixflow members list --project proj_abc123")
def list_command(context: typer.Context, project: Where = None, as_json: Json = False) -> None:
    """List members."""
    entries = administer(context, lambda api: api.collect("/members", {"project_id": project}))
    show_list("members", ("user_id", "email", "name", "role", "created_at"), entries, as_json)


@app.command("set", epilog="Example:\n\n$ helixflow members set user_abc123 --role developer")
def set_command(
    context: typer.Context,
    user_id: UserId,
    role: Annotated[str, typer.Option("--role", help="The role that they get.")],
    project: Where = None,
    as_json: Json = False,
) -> None:
    """Give a role, or change it."""
    path, query = f"/members/{part(user_id)}", {"project_id": project}
    member = administer(context, lambda api: api.ask("PUT", path, {"role": role}, query))
    if as_json:
        print_json(member)
    else:
        print_lines(f"{member['email']} is {member['role']} in {member['project_id'] or 'the organisation'}")


@app.command("remove", epilog="Example:\n\n$ helixflow members remove user_abc123 --project proj_abc123")
def remove_command(context: typer.Context, user_id: UserId, project: Where = None) -> None:
    """Take the role away."""
    path, query = f"/members/{part(user_id)}", {"project_id": project}
    administer(context, lambda api: api.ask("DELETE", path, query=query))
    print_lines(f"removed {user_id} from {project or 'the organisation'}")
