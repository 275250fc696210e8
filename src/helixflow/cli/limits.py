"""`helixflow limits`: how many requests and tokens, through the admin API."""

from typing import Annotated, Any

import typer

from helixflow.cli.administration import Json, administer, cell, part, present, show_list
from helixflow.cli.output import print_json, print_lines
from helixflow.core.errors import ExitCode, UserError

app = typer.Typer(
    help="List, create, change and delete limits: requests and tokens in a time, requests at the same time.",
    epilog="Example:\n\n$ helixflow limits create requests-per-minute 600 --key key_abc123",
    no_args_is_help=True,
)
METRICS = ("requests-per-minute", "tokens-per-minute", "tokens-per-day", "parallel-requests")

LimitId = Annotated[str, typer.Argument(metavar="LIMIT_ID", help="Id of the limit, as `limits list` shows it.")]
Key = Annotated[str | None, typer.Option("--key", metavar="ID", help="On this API key.")]
User = Annotated[str | None, typer.Option("--user", metavar="ID", help="On this user or service account.")]
InProject = Annotated[str | None, typer.Option("--project", metavar="ID", help="On this project.")]
Organisation = Annotated[
    str | None, typer.Option("--org", metavar="ID", help="Of another organisation; for operators.")
]
Impose = Annotated[bool, typer.Option("--impose", help="Only operators of the installation may change it; for them.")]
_COLUMNS = ("id", "scope", "subject_id", "model", "metric", "value", "burst", "imposed")


@app.command("list", epilog="Example:\n\n$ helixflow limits list\n\n$ helixflow limits list --json")
def list_command(context: typer.Context, organisation: Organisation = None, as_json: Json = False) -> None:
    """List all limits of the organisation, newest first; operators see those of the installation too."""
    query = {"organisation_id": organisation}
    entries = administer(context, lambda api: api.collect("/limits", query))
    show_list("limits", _COLUMNS, entries, as_json)


@app.command(
    "create",
    epilog="Example:\n\n$ helixflow limits create tokens-per-day 1000000 --project proj_abc123\n\n"
    "$ helixflow limits create requests-per-minute 6000 --model smollm2-135m-instruct --installation",
)
def create_command(
    context: typer.Context,
    metric: Annotated[str, typer.Argument(metavar="METRIC", help=f"One of: {', '.join(METRICS)}.")],
    value: Annotated[int, typer.Argument(metavar="VALUE", help="How many.")],
    key: Key = None,
    user: User = None,
    project: InProject = None,
    installation: Annotated[
        bool, typer.Option("--installation", help="On the whole installation; for operators.")
    ] = False,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Of this model; default: all together.")
    ] = None,
    burst: Annotated[
        int | None, typer.Option("--burst", help="How many of them may come at once; default: as many as VALUE.")
    ] = None,
    impose: Impose = False,
    organisation: Organisation = None,
    as_json: Json = False,
) -> None:
    """Create a limit: on the organisation, or on what is named."""
    if metric.replace("_", "-") not in METRICS:
        raise UserError(f"there is no limit of {metric!r}; known: {', '.join(METRICS)}", ExitCode.USAGE)
    body = present(
        **subject_of(key=key, user=user, project=project, installation=installation or None),
        metric=metric.replace("-", "_"),
        value=value,
        model=model,
        burst=burst,
        imposed=impose or installation or None,
        organisation_id=organisation,
    )
    made = administer(context, lambda api: api.ask("POST", "/limits", body))
    _show("Created", made, as_json)


@app.command("update", epilog="Example:\n\n$ helixflow limits update limit_abc123 --value 1200")
def update_command(
    context: typer.Context,
    limit_id: LimitId,
    value: Annotated[int | None, typer.Option("--value", help="How many.")] = None,
    burst: Annotated[int | None, typer.Option("--burst", help="How many of them may come at once.")] = None,
    as_json: Json = False,
) -> None:
    """Change a limit, everywhere within a second. A burst that was as the value follows it."""
    body = present(value=value, burst=burst)
    if not body:
        raise UserError("say what changes; see: helixflow limits update --help", ExitCode.USAGE)
    _show("Changed", administer(context, lambda api: api.ask("PATCH", f"/limits/{part(limit_id)}", body)), as_json)


@app.command("delete", epilog="Example:\n\n$ helixflow limits delete limit_abc123")
def delete_command(context: typer.Context, limit_id: LimitId) -> None:
    """Delete a limit."""
    administer(context, lambda api: api.ask("DELETE", f"/limits/{part(limit_id)}"))
    print_lines(f"deleted {limit_id}")


def subject_of(**named: str | bool | None) -> dict[str, Any]:
    """`scope` and `subject_id` of what is named, at most one; of nothing: the organisation. Raises `UserError`."""
    given = present(**named)
    if len(given) > 1:
        raise UserError(f"give one of: {', '.join(f'--{name}' for name in given)}", ExitCode.USAGE)
    for scope, subject in given.items():
        return {"scope": scope, "subject_id": None if subject is True else subject}
    return {"scope": "organisation"}


def place_of(policy: dict[str, Any]) -> str:
    """What a limit or budget is on, for people."""
    place = str(policy["scope"])
    if policy["scope"] not in ("installation", "organisation"):
        place = f"{place} {policy['subject_id']}"
    return f"{place}, imposed" if policy["imposed"] else place


def _show(done: str, limit: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(limit)
        return
    what = f"{cell(limit['value'])} {limit['metric'].replace('_', ' ')}"
    of = f" of {limit['model']}" if limit["model"] else ""
    burst = f" ({limit['burst']} at once)" if limit["burst"] not in (0, limit["value"]) else ""
    print_lines(f"{done} {limit['id']}: {what}{of}{burst}, on {place_of(limit)}.")
