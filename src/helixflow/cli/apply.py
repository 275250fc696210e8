"""`helixflow apply`: puts the models of a file in force while everything runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from helixflow.cli.administration import Json, present
from helixflow.cli.output import print_json, print_lines
from helixflow.cli.serving_plan import ModelsFile, describe_plan

if TYPE_CHECKING:
    from typing import Any

    from helixflow.cli.admin_api import AdminApi

EPILOG = (
    "Example:\n\n$ helixflow apply -f models.toml --dry-run\n\n"
    '$ helixflow apply -f models.toml --note "more weight for the second region"'
)


def apply_command(
    context: typer.Context,
    file: Annotated[Path, typer.Option("--file", "-f", metavar="FILE", help="Configuration file with the models.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would change.")] = False,
    note: Annotated[
        str | None, typer.Option("--note", metavar="TEXT", help="What it is for; kept in the history.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Serve the models that a file names instead of those in force. Running requests are left alone.

    Other sections of the file are not taken: they need a restart.
    """
    given = ModelsFile.read(file)

    async def put(api: "AdminApi") -> "dict[str, Any]":
        plan = await api.ask("POST", "/configuration/plan", {"models": given.models})
        if dry_run or not plan["changes"]:
            return {"plan": plan, "applied": None}
        body = present(models=given.models, origin="apply", note=note)
        applied = await api.ask("PUT", "/configuration", body, if_version=plan["version"])
        return {"plan": plan, "applied": applied["version"]}

    done = given.submit(context, put)
    if as_json:
        print_json({**done["plan"], "applied": done["applied"]})
        return
    print_lines(*describe_plan(done["plan"]))
    if done["applied"] is not None:
        print_lines(
            f"version {done['applied']} is in force; back with: helixflow config rollback {done['plan']['version']}"
        )
    if given.others:
        print_lines(f"not taken from {file}: {', '.join(given.others)}")
