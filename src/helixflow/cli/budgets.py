"""`helixflow budgets`: how much money and how many tokens, through the admin API."""

from typing import Annotated, Any

import typer

from helixflow.cli.administration import Json, administer, cell, part, present, show_fields, show_list
from helixflow.cli.limits import Impose, InProject, Key, Organisation, place_of, subject_of
from helixflow.cli.output import print_json, print_lines, print_table
from helixflow.core.errors import ExitCode, UserError

app = typer.Typer(
    help="List, show, create, change and delete budgets, and see which thresholds were reached.",
    epilog="Example:\n\n$ helixflow budgets create 250 --per month --project proj_abc123",
    no_args_is_help=True,
)
PERIODS = ("day", "month", "total")

BudgetId = Annotated[str, typer.Argument(metavar="BUDGET_ID", help="Id of the budget, as `budgets list` shows it.")]
Thresholds = Annotated[
    list[int] | None,
    typer.Option("--threshold", metavar="PERCENT", help="At how much of it an event is raised. Several times."),
]


@app.command("list", epilog="Example:\n\n$ helixflow budgets list\n\n$ helixflow budgets list --json")
def list_command(context: typer.Context, organisation: Organisation = None, as_json: Json = False) -> None:
    """List all budgets of the organisation and what is spent of them, newest first."""
    query = {"organisation_id": organisation}
    entries = administer(context, lambda api: api.collect("/budgets", query))
    if as_json:
        print_json({"budgets": entries})
        return
    print_table(
        ("id", "on", "per", "spent", "cap"),
        [
            (budget["id"], place_of(budget), budget["period"], _amount(budget, "spent"), _amount(budget, "cap"))
            for budget in entries
        ],
    )


@app.command("show", epilog="Example:\n\n$ helixflow budgets show budget_abc123")
def show_command(context: typer.Context, budget_id: BudgetId, as_json: Json = False) -> None:
    """Show a budget and what is spent of it in this period; what runs at the moment is not in it."""
    _show(administer(context, lambda api: api.ask("GET", f"/budgets/{part(budget_id)}")), as_json)


@app.command(
    "create",
    epilog="Example:\n\n$ helixflow budgets create 250.00 --per month\n\n"
    "$ helixflow budgets create 5000000 --tokens --per day --key key_abc123 --threshold 90",
)
def create_command(
    context: typer.Context,
    cap: Annotated[str, typer.Argument(metavar="CAP", help="Dollars, such as 250 or 0.50; with --tokens: tokens.")],
    per: Annotated[str, typer.Option("--per", metavar="PERIOD", help="day, month, or total: never anew.")] = "month",
    tokens: Annotated[bool, typer.Option("--tokens", help="Of tokens instead of money.")] = False,
    key: Key = None,
    project: InProject = None,
    thresholds: Thresholds = None,
    impose: Impose = False,
    organisation: Organisation = None,
    as_json: Json = False,
) -> None:
    """Create a budget: on the organisation, or on what is named. What was spent in this period counts."""
    if per not in PERIODS:
        raise UserError(f"--per {per!r}: give one of {', '.join(PERIODS)}", ExitCode.USAGE)
    body = present(
        **subject_of(key=key, project=project),
        unit="tokens" if tokens else "money",
        period=per,
        cap=cap,
        thresholds=sorted(thresholds) if thresholds else None,
        imposed=impose or None,
        organisation_id=organisation,
    )
    made = administer(context, lambda api: api.ask("POST", "/budgets", body))
    _show(made, as_json)


@app.command("update", epilog="Example:\n\n$ helixflow budgets update budget_abc123 --cap 500")
def update_command(
    context: typer.Context,
    budget_id: BudgetId,
    cap: Annotated[str | None, typer.Option("--cap", help="Dollars or tokens, whichever it is of.")] = None,
    thresholds: Thresholds = None,
    as_json: Json = False,
) -> None:
    """Change a budget, everywhere within a second."""
    body = present(cap=cap, thresholds=sorted(thresholds) if thresholds else None)
    if not body:
        raise UserError("say what changes; see: helixflow budgets update --help", ExitCode.USAGE)
    _show(administer(context, lambda api: api.ask("PATCH", f"/budgets/{part(budget_id)}", body)), as_json)


@app.command("delete", epilog="Example:\n\n$ helixflow budgets delete budget_abc123")
def delete_command(context: typer.Context, budget_id: BudgetId) -> None:
    """Delete a budget. Its events stay."""
    administer(context, lambda api: api.ask("DELETE", f"/budgets/{part(budget_id)}"))
    print_lines(f"deleted {budget_id}")


@app.command("events", epilog="Example:\n\n$ helixflow budgets events --budget budget_abc123")
def events_command(
    context: typer.Context,
    budget: Annotated[
        str | None, typer.Option("--budget", metavar="ID", help="Only of this budget; default: of all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the thresholds that were reached, newest first."""
    entries = administer(context, lambda api: api.collect("/budget-events", {"budget_id": budget}))
    show_list("events", ("at", "budget_id", "threshold", "spent", "cap"), entries, as_json)


def _show(budget: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(budget)
        return
    per = "altogether" if budget["period"] == "total" else f"per {budget['period']}"
    show_fields(
        f"{_amount(budget, 'cap')} {per} ({budget['id']})",
        [
            ("on", place_of(budget)),
            ("spent", _amount(budget, "spent")),
            ("begins anew", cell(budget["period_end"]) if budget["period_end"] else "never"),
            ("events at", ", ".join(f"{threshold} %" for threshold in budget["thresholds"])),
        ],
    )


def _amount(budget: dict[str, Any], field: str) -> str:
    return f"${budget[field]}" if budget["unit"] == "money" else f"{budget[field]} tokens"
