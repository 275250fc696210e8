"""`helixflow config plan`, `history`, `rollback` and `status`: the serving configuration of a running installation."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from helixflow.cli.administration import Json, administer, cell, present
from helixflow.cli.invocation import invocation_of
from helixflow.cli.output import print_json, print_lines, print_table
from helixflow.cli.serving_plan import ModelsFile, describe_plan
from helixflow.core.errors import ExitCode, UserError

if TYPE_CHECKING:
    from typing import Any

    from helixflow.cli.admin_api import AdminApi

PLAN_EPILOG = "Example:\n\n$ helixflow config plan -f models.toml\n\n$ helixflow config plan --revision 3"
HISTORY_EPILOG = "Example:\n\n$ helixflow config history"
ROLLBACK_EPILOG = "Example:\n\n$ helixflow config rollback 3"
STATUS_EPILOG = "Example:\n\n$ helixflow config status"


def plan_command(
    context: typer.Context,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", metavar="FILE", help="Configuration file; default: the one in use."),
    ] = None,
    revision: Annotated[
        int | None, typer.Option("--revision", min=1, metavar="NUMBER", help="An earlier version instead of a file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what would change in what is served, and how many recorded requests went there."""
    if revision is not None:
        if file is not None:
            raise UserError("give --file or --revision, not both", ExitCode.USAGE)
        plan = administer(context, lambda api: api.ask("POST", "/configuration/plan", {"revision": revision}))
    else:
        path = file or invocation_of(context).config_file
        if path is None:
            raise UserError("there is no configuration file in use: name one with --file", ExitCode.USAGE)
        given = ModelsFile.read(path)
        plan = given.submit(context, lambda api: api.ask("POST", "/configuration/plan", {"models": given.models}))
    if as_json:
        print_json(plan)
    else:
        print_lines(*describe_plan(plan))


def history_command(context: typer.Context, as_json: Json = False) -> None:
    """List the versions of what is served, newest first: the first one is in force."""
    versions = administer(context, lambda api: api.collect("/configuration/revisions"))
    if as_json:
        print_json({"versions": versions})
        return
    print_table(
        ("version", "since", "from", "by", "note"),
        [
            (
                str(version["version"]),
                *(cell(version[name]) for name in ("created_at", "origin", "actor_name", "note")),
            )
            for version in versions
        ],
    )


def rollback_command(
    context: typer.Context,
    revision: Annotated[int, typer.Argument(metavar="VERSION", min=1, help="Which one: a number out of the history.")],
    note: Annotated[str | None, typer.Option("--note", metavar="TEXT", help="What it is for.")] = None,
    as_json: Json = False,
) -> None:
    """Put an earlier version in force again, as a new one."""

    async def put(api: "AdminApi") -> "dict[str, Any]":
        plan = await api.ask("POST", "/configuration/plan", {"revision": revision})
        body = present(revision=revision, note=note)
        applied = await api.ask("POST", "/configuration/rollback", body, if_version=plan["version"])
        return {**plan, "applied": applied["version"]}

    done = administer(context, put)
    if as_json:
        print_json(done)
    else:
        print_lines(*describe_plan(done), f"version {done['applied']} is in force")


def status_command(context: typer.Context, as_json: Json = False) -> None:
    """Show which version gateways and pools serve, and what keeps them from a later one."""

    async def ask(api: "AdminApi") -> "dict[str, Any]":
        in_force = await api.ask("GET", "/configuration")
        followers = await api.ask("GET", "/configuration/followers")
        return {"version": in_force["version"], "followers": followers["data"]}

    status = administer(context, ask)
    if as_json:
        print_json(status)
        return
    print_lines(f"version {status['version']} is in force")
    print_table(
        ("service", "node", "version", "problem"),
        [(one["service"], one["node"], str(one["version"] or ""), cell(one["problem"])) for one in status["followers"]],
    )
