"""`helixflow service-accounts`: identities of programs."""

from typing import Annotated

import typer

from helixflow.cli.administration import Json, Project, administer, part, present, show_list
from helixflow.cli.output import print_json, print_lines

app = typer.Typer(
    help="List, create and delete service accounts.",
    epilog="Example:\n\n$ helixflow service-accounts create nightly-report --role developer",
    no_args_is_help=True,
)


@app.command("list", epilog="Example:\n\n$ helixflow service-accounts list")
def list_command(context: typer.Context, project: Project = None, as_json: Json = False) -> None:
    """List service accounts, newest first."""
    entries = administer(context, lambda api: api.collect("/service-accounts", {"project_id": project}))
    columns = ("id", "name", "role", "project_id", "suspended", "created_at")
    show_list("service_accounts", columns, entries, as_json)


@app.command("create", epilog="Example:\n\n$ helixflow service-accounts create nightly-report --role developer")
def create_command(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name.")],
    role: Annotated[str, typer.Option("--role", help="Its role.")],
    project: Annotated[
        str | None,
        typer.Option("--project", metavar="ID", help="Where its role holds; default: in the organisation."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Create a service account; make keys for it with `keys create --owner`."""
    body = present(name=name, role=role, project_id=project)
    made = administer(context, lambda api: api.ask("POST", "/service-accounts", body))
    if as_json:
        print_json(made)
    else:
        print_lines(f"Created {made['name']} ({made['id']}).")


@app.command("delete", epilog="Example:\n\n$ helixflow service-accounts delete sa_abc123")
def delete_command(
    context: typer.Context,
    account_id: Annotated[str, typer.Argument(metavar="ID", help="Id of the service account.")],
) -> None:
    """Delete a service account and revoke its keys."""
    administer(context, lambda api: api.ask("DELETE", f"/service-accounts/{part(account_id)}"))
    print_lines(f"deleted {account_id}")
