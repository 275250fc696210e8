"""`helixflow requests`: single requests in the ledger, through the admin API."""

from typing import Annotated, Any

import typer

from helixflow.cli.administration import Json, administer, cell, part, show_fields
from helixflow.cli.output import print_json, print_lines, print_table
from helixflow.cli.usage import From, OfKey, OfModel, OfProject, To

app = typer.Typer(
    help="List single requests, and explain why each went as it went.",
    epilog="Example:\n\n$ helixflow requests list --from 1d --outcome failed\n\n$ helixflow requests explain req_5c1a",
    no_args_is_help=True,
)

Id = Annotated[str, typer.Argument(metavar="ID", help="Its call id, or the x-request-id of its answer.")]


@app.command(
    "list",
    epilog="Example:\n\n$ helixflow requests list --from 1d\n\n"
    "$ helixflow requests list --outcome failed --model smollm2-135m-instruct --limit 100",
)
def list_command(
    context: typer.Context,
    since: From = None,
    until: To = None,
    project: OfProject = None,
    key: OfKey = None,
    model: OfModel = None,
    outcome: Annotated[
        str | None,
        typer.Option("--outcome", help="Only these: completed, failed, cancelled, interrupted or lost."),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=10_000, help="Most requests shown.")] = 20,
    as_json: Json = False,
) -> None:
    """List requests that have ended, newest first, of 31 days at most."""
    from helixflow.cli.usage_api import list_requests, range_of

    filters = {"project_id": project, "key_id": key, "model": model, "outcome": outcome}
    query = {**range_of(since, until), **{name: value for name, value in filters.items() if value}}
    requests = administer(context, lambda api: list_requests(api, query, limit))
    if as_json:
        print_json({"requests": requests})
        return
    columns = ("when", "request", "model", "outcome", "tokens", "took", "cost (USD)")
    print_table(columns, [_row(request) for request in requests])


@app.command("show", epilog="Example:\n\n$ helixflow requests show req_5c1a")
def show_command(context: typer.Context, id: Id, as_json: Json = False) -> None:
    """Show one request."""
    request = administer(context, lambda api: api.ask("GET", f"/requests/{part(id)}"))
    if as_json:
        print_json(request)
        return
    tags = ", ".join(f"{name}={value}" for name, value in request["tags"].items())
    fields = {**request, "tags": tags or None}
    show_fields(f"Request {fields.pop('call_id')}", [(name, cell(value)) for name, value in fields.items()])


@app.command("explain", epilog="Example:\n\n$ helixflow requests explain req_5c1a")
def explain_command(context: typer.Context, id: Id, as_json: Json = False) -> None:
    """Explain a request: how it was authorised, limited, routed, tried again and priced."""
    told = administer(context, lambda api: api.ask("GET", f"/requests/{part(id)}/explain"))
    if as_json:
        print_json(told)
        return
    ended = told["outcome"] if told["error"] is None else f"{told['outcome']} ({told['error']})"
    print_lines(f"Request {told['call_id']}, admitted {told['admitted_at']}: {told['status']} {ended}")
    for topic in ("authorised", "limited", "routed", "retried", "priced"):
        print_lines("", topic.capitalize(), *(f"  {line}" for line in _lines(told[topic])))


def _row(request: dict[str, Any]) -> tuple[str, ...]:
    outcome = request["outcome"] if request["error"] is None else f"{request['outcome']} ({request['error']})"
    tokens = f"{request['prompt_tokens']} + {request['completion_tokens']}"
    took = "–" if request["duration_ms"] is None else f"{request['duration_ms']} ms"
    when = f"{request['admitted_at'][:19]}Z"
    return (when, request["request_id"], request["model"], outcome, tokens, took, request["cost"])


def _lines(told: dict[str, Any] | list[dict[str, Any]]) -> list[str]:
    """What there is to say of a topic: a line for each value, inner ones with dots."""
    if isinstance(told, list):
        return [f"{entry['deployment']}: {entry['error']}" for entry in told] or ["not needed"]
    lines = []
    for name, value in told.items():
        if isinstance(value, dict):
            lines += [f"{name}.{line}" for line in _lines(value)]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines += [f"{name}[{index}].{line}" for index, entry in enumerate(value) for line in _lines(entry)]
        elif value not in (None, []):
            lines.append(f"{name}: {cell(value)}")
    return lines
