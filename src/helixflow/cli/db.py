"""`helixflow db`: brings the database to the schema of this version, and looks whether it is sound."""

from typing import TYPE_CHECKING, Annotated

import typer

from helixflow.cli.invocation import invocation_of
from helixflow.cli.output import print_json, print_lines
from helixflow.core.errors import ExitCode, UserError

if TYPE_CHECKING:
    from helixflow.storage.inspection import Standing

app = typer.Typer(
    help="Upgrade and check the database.",
    epilog="Example:\n\n$ helixflow db current\n\n$ helixflow db upgrade",
    no_args_is_help=True,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_STATES = {
    "current": "which is this version's",
    "older": "older than this version's {newest}; helixflow db upgrade brings it there",
    "newer": "newer than this version's {newest}; upgrade HelixFlow",
    "empty": "no schema yet; helixflow db upgrade makes that of this version ({newest})",
}


@app.command("upgrade", epilog="Example:\n\n$ helixflow db upgrade\n\n$ helixflow db upgrade --to 0001")
def upgrade_command(
    context: typer.Context,
    to: Annotated[str | None, typer.Option("--to", metavar="REV", help="Revision; default: this version's.")] = None,
    as_json: Json = False,
) -> None:
    """Bring the database to the schema of this version, whole or not at all; the start of the service does so too."""
    settings = invocation_of(context).load_settings()
    import asyncio

    from helixflow.storage.inspection import find_standing
    from helixflow.storage.revisions import known_revisions
    from helixflow.storage.upgrade import upgrade

    if to is not None and to not in known_revisions():
        raise UserError(f"--to: there is no revision {to}; there are {', '.join(known_revisions())}", ExitCode.USAGE)

    async def run() -> "Standing":
        await upgrade(settings, to if to is not None else "head")
        return await find_standing(settings)

    standing = asyncio.run(run())
    if to is not None and standing.revision != to:
        message = f"{standing.name}: is at revision {standing.revision} already, and this command goes only up"
        raise UserError(message, ExitCode.USAGE)
    _show(standing, as_json=as_json)


@app.command("current", epilog="Example:\n\n$ helixflow db current\n\n$ helixflow db current --json")
def current_command(context: typer.Context, as_json: Json = False) -> None:
    """Show which revision of the schema the database has, and whether it is this version's. Changes nothing."""
    settings = invocation_of(context).load_settings()
    import asyncio

    from helixflow.storage.inspection import find_standing

    _show(asyncio.run(find_standing(settings)), as_json=as_json)


@app.command("check", epilog="Example:\n\n$ helixflow db check")
def check_command(context: typer.Context, as_json: Json = False) -> None:
    """Check that the database answers, has this version's schema and is sound; exit code 7 when it is not."""
    settings = invocation_of(context).load_settings()
    import asyncio

    from helixflow.storage.inspection import find_problems, find_standing

    async def run() -> "tuple[str, list[str]]":
        standing = await find_standing(settings)
        if standing.state != "current":
            return standing.name, [_describe(standing)]
        return standing.name, await find_problems(settings)

    name, problems = asyncio.run(run())
    if as_json:
        print_json({"ok": not problems, "database": name, "problems": problems})
        if problems:
            raise typer.Exit(ExitCode.STORAGE.value)
    elif problems:
        raise UserError("\n".join(f"{name}: {problem}" for problem in problems), ExitCode.STORAGE)
    else:
        print_lines(f"{name}: the database is fine")


def _show(standing: "Standing", *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "database": standing.name,
                "revision": standing.revision,
                "newest": standing.newest,
                "state": standing.state,
            }
        )
    else:
        print_lines(f"{standing.name}: {_describe(standing)}")


def _describe(standing: "Standing") -> str:
    state = _STATES[standing.state].format(newest=standing.newest)
    return state if standing.revision is None else f"revision {standing.revision}, {state}"
