"""`helixflow orgs`: organisations."""

from typing import Annotated, Any

import typer

from helixflow.cli.administration import Json, administer, cell, part, present, show_fields, show_list, show_token
from helixflow.cli.output import print_json

app = typer.Typer(
    help="List, create, show and change organisations, and invite owners.",
    epilog='Example:\n\n$ helixflow orgs create "Example Ltd" --owner ada@example.com',
    no_args_is_help=True,
)
OrganisationId = Annotated[str, typer.Argument(metavar="ID", help="Id of the organisation.")]


@app.command("list", epilog="Example:\n\n$ helixflow orgs list")
def list_command(context: typer.Context, as_json: Json = False) -> None:
    """List all organisations; for operators of the installation."""
    entries = administer(context, lambda api: api.collect("/organisations"))
    show_list("organisations", ("id", "name", "created_at"), entries, as_json)


@app.command("create", epilog='Example:\n\n$ helixflow orgs create "Example Ltd" --owner ada@example.com')
def create_command(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name.")],
    owner: Annotated[str, typer.Option("--owner", metavar="EMAIL", help="Its first owner, who is invited.")],
    as_json: Json = False,
) -> None:
    """Create an organisation; for operators of the installation."""
    body = {"name": name, "owner_email": owner}
    made = administer(context, lambda api: api.ask("POST", "/organisations", body))
    if as_json:
        print_json(made)
        return
    organisation = made["organisation"]
    show_token(
        f"Created {organisation['name']} ({organisation['id']}).",
        made["invitation_token"],
        owner,
        made["invitation"]["expires_at"],
    )


@app.command("invite-owner", epilog="Example:\n\n$ helixflow orgs invite-owner org_abc123 ada@example.com")
def invite_owner_command(
    context: typer.Context,
    organisation_id: OrganisationId,
    email: Annotated[str, typer.Argument(metavar="EMAIL", help="Who is to own it too.")],
    as_json: Json = False,
) -> None:
    """Invite one more owner of any organisation, whose own can sign in no more; for operators of the installation."""
    path, body = f"/organisations/{part(organisation_id)}/owners", {"owner_email": email}
    made = administer(context, lambda api: api.ask("POST", path, body))
    if as_json:
        print_json(made)
        return
    invitation = made["invitation"]
    show_token(f"Invited {email} ({invitation['id']}).", made["token"], email, invitation["expires_at"])


@app.command("show", epilog="Example:\n\n$ helixflow orgs show org_abc123")
def show_command(context: typer.Context, organisation_id: OrganisationId, as_json: Json = False) -> None:
    """Show an organisation."""
    _show(administer(context, lambda api: api.ask("GET", f"/organisations/{part(organisation_id)}")), as_json)


@app.command("update", epilog="Example:\n\n$ helixflow orgs update org_abc123 --audit-retention-days 365")
def update_command(
    context: typer.Context,
    organisation_id: OrganisationId,
    name: Annotated[str | None, typer.Option("--name", help="Its new name.")] = None,
    retention: Annotated[
        int | None,
        typer.Option("--audit-retention-days", metavar="DAYS", help="Keep audit records so long; 0: for ever."),
    ] = None,
    residency: Annotated[
        str | None,
        typer.Option("--residency", metavar="REGION", help="Only deployments of this region serve it; '' for any."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Change an organisation."""
    body = present(name=name, audit_retention_days=retention, residency=residency)
    _show(administer(context, lambda api: api.ask("PATCH", f"/organisations/{part(organisation_id)}", body)), as_json)


@app.command("shares", epilog="Example:\n\n$ helixflow orgs shares org_abc123 --weight 200 --max-priority 5")
def shares_command(
    context: typer.Context,
    organisation_id: OrganisationId,
    weight: Annotated[
        int | None, typer.Option("--weight", help="1 to 10000, usually 100: its share when requests wait.")
    ] = None,
    max_priority: Annotated[
        int | None, typer.Option("--max-priority", help="0 to 10: the highest priority of its keys.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what an organisation gets of engines that are full; for operators of the installation."""
    body = present(share_weight=weight, max_priority=max_priority)
    path = f"/organisations/{part(organisation_id)}/shares"
    _show(administer(context, lambda api: api.ask("PATCH", path, body)), as_json)


def _show(organisation: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(organisation)
        return
    days = organisation["audit_retention_days"]
    show_fields(
        f"{organisation['name']} ({organisation['id']})",
        [
            ("created", cell(organisation["created_at"])),
            ("audit records", f"kept for {days} days" if days else "kept for ever"),
            ("residency", organisation["residency"] or "any region"),
            ("share", f"weight {organisation['share_weight']}, priorities to {organisation['max_priority']}"),
        ],
    )
