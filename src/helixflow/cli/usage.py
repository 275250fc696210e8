"""`helixflow usage`: what was used and what it cost, through the admin API."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from helixflow.cli.administration import Json, administer, cell
from helixflow.cli.journals import CLOSE_EPILOG, JOURNALS_EPILOG, close_journal_command, journals_command
from helixflow.cli.output import print_json, print_lines, print_table
from helixflow.cli.rerate import EPILOG as RERATE_EPILOG
from helixflow.cli.rerate import rerate_command

app = typer.Typer(
    help="Show and export what was used and what it cost.",
    epilog="Example:\n\n$ helixflow usage show --group-by day --from 7d\n\n"
    "$ helixflow usage export --format csv --output usage.csv",
    no_args_is_help=True,
)

GroupBy = Annotated[
    list[str] | None,
    typer.Option(
        "--group-by",
        metavar="WHAT",
        help="key, project, user, model, deployment, operation, hour, day, month or tag:NAME; repeat it or put commas "
        "between.",
    ),
]
From = Annotated[
    str | None, typer.Option("--from", metavar="WHEN", help="From then on: 7d, 12h, 2w ago, a date or a time (UTC).")
]
To = Annotated[str | None, typer.Option("--to", metavar="WHEN", help="Before that time; default: until now.")]
OfProject = Annotated[str | None, typer.Option("--project", metavar="ID", help="Only this project.")]
OfKey = Annotated[str | None, typer.Option("--key", metavar="ID", help="Only this API key.")]
OfUser = Annotated[str | None, typer.Option("--user", metavar="ID", help="Only this account or service account.")]
OfModel = Annotated[str | None, typer.Option("--model", metavar="NAME", help="Only this model.")]
Operation = Literal["chat/completions", "completions", "embeddings"]
OfOperation = Annotated[Operation | None, typer.Option("--operation", help="Only what was asked of this path of /v1.")]
WithTag = Annotated[str | None, typer.Option("--tag", metavar="NAME=VALUE", help="Only requests with this tag.")]

_FIGURES = (
    ("requests", "requests"),
    ("failed_requests", "failed"),
    ("prompt_tokens", "prompt"),
    ("cached_tokens", "cached"),
    ("completion_tokens", "completion"),
    ("reasoning_tokens", "reasoning"),
    ("cost", "cost (USD)"),
)


class Format(StrEnum):
    CSV = "csv"
    JSON = "json"


@app.command(
    "show",
    epilog="Example:\n\n$ helixflow usage show --group-by day --from 7d\n\n"
    "$ helixflow usage show --group-by project,model --tag team=search",
)
def show_command(
    context: typer.Context,
    group_by: GroupBy = None,
    since: From = None,
    until: To = None,
    project: OfProject = None,
    key: OfKey = None,
    user: OfUser = None,
    model: OfModel = None,
    operation: OfOperation = None,
    tag: WithTag = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=10_000, help="Most rows shown.")] = 100,
    as_json: Json = False,
) -> None:
    """Show usage by groups (default: day), of the last 30 days unless --from says otherwise."""
    from helixflow.cli.usage_api import query_of, read_report

    query = query_of(group_by or ["day"], since, until, _filters(project, key, user, model, operation, tag))
    report = administer(context, lambda api: read_report(api, query, limit))
    if as_json:
        print_json(report)
    else:
        _print_report(report)


@app.command(
    "export",
    epilog="Example:\n\n$ helixflow usage export --format csv --output usage.csv --from 2026-11-01 --to 2026-12-01\n\n"
    "$ helixflow usage export --format json --group-by month,project",
)
def export_command(
    context: typer.Context,
    group_by: GroupBy = None,
    since: From = None,
    until: To = None,
    project: OfProject = None,
    key: OfKey = None,
    user: OfUser = None,
    model: OfModel = None,
    operation: OfOperation = None,
    tag: WithTag = None,
    format: Annotated[Format, typer.Option("--format", help="csv, for spreadsheets too, or json.")] = Format.CSV,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write it there, readable by you only.")
    ] = None,
) -> None:
    """Export usage by groups (default: day, project and model), all rows."""
    from helixflow.cli.audit_api import written_whole
    from helixflow.cli.usage_api import export, query_of

    query = query_of(
        group_by or ["day", "project", "model"], since, until, _filters(project, key, user, model, operation, tag)
    )
    if output is None:
        administer(context, lambda api: export(api, query, format.value, sys.stdout.buffer))
        return
    with written_whole(output) as file:
        administer(context, lambda api: export(api, query, format.value, file))


app.command("rerate", epilog=RERATE_EPILOG)(rerate_command)
app.command("journals", epilog=JOURNALS_EPILOG)(journals_command)
app.command("close-journal", epilog=CLOSE_EPILOG)(close_journal_command)


def _filters(
    project: str | None,
    key: str | None,
    user: str | None,
    model: str | None,
    operation: Operation | None,
    tag: str | None,
) -> dict[str, str | None]:
    return {"project_id": project, "key_id": key, "user_id": user, "model": model, "operation": operation, "tag": tag}


def _print_report(report: dict[str, Any]) -> None:
    print_lines(f"from {cell(report['from'])} to {cell(report['to'])}", flush=True)
    groups = list(report["data"][0]["group"]) if report["data"] else []
    rows = [(*(cell(entry["group"][name] or None) for name in groups), *_figures(entry)) for entry in report["data"]]
    if groups:
        rows.append(("total", *[""] * (len(groups) - 1), *_figures(report["total"])))
    print_table([*groups, *(heading for _, heading in _FIGURES)], rows or [_figures(report["total"])])
    if report["next_cursor"] is not None:
        print_lines("There are more rows: give a higher --limit, or use helixflow usage export.")


def _figures(entry: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(entry[name]) for name, _ in _FIGURES)
