"""`helixflow projects`: projects of the organisation."""

from typing import Annotated

import typer

from helixflow.cli.administration import Json, administer, part, show_list
from helixflow.cli.output import print_json, print_lines

app = typer.Typer(
    help="List, create and delete projects.",
    epilog="Example:\n\n$ helixflow projects create Research",
    no_args_is_help=True,
)


@app.command("list", epilog="Example:\n\n$ helixflow projects list")
def list_command(context: typer.Context, as_json: Json = False) -> None:
    """List the projects that you may see."""
    entries = administer(context, lambda api: api.collect("/projects"))
    show_list("projects", ("id", "name", "created_at"), entries, as_json)


@app.command("create", epilog="Example:\n\n$ helixflow projects create Research")
def create_command(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name.")],
    as_json: Json = False,
) -> None:
    """Create a project."""
    made = administer(context, lambda api: api.ask("POST", "/projects", {"name": name}))
    if as_json:
        print_json(made)
    else:
        print_lines(f"Created {made['name']} ({made['id']}).")


@app.command("delete", epilog="Example:\n\n$ helixflow projects delete proj_abc123")
def delete_command(
    context: typer.Context,
    project_id: Annotated[str, typer.Argument(metavar="ID", help="Id of the project.")],
) -> None:
    """Delete a project: its keys are revoked and its members removed."""
    administer(context, lambda api: api.ask("DELETE", f"/projects/{part(project_id)}"))
    print_lines(f"deleted {project_id}")
