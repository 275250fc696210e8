"""`helixflow usage journals` and `usage close-journal`: what gateways recorded and the ledger still waits for."""

from typing import Annotated, Any

import typer

from helixflow.cli.administration import Json, administer, cell
from helixflow.cli.output import print_json, print_lines, print_table

JOURNALS_EPILOG = "Example:\n\n$ helixflow usage journals"
CLOSE_EPILOG = "Example:\n\n$ helixflow usage close-journal 9f86d081884c7d65a1b2c3d4"


def journals_command(context: typer.Context, as_json: Json = False) -> None:
    """List the journals of gateways that are still open, the oldest first."""
    journals = administer(context, lambda api: api.collect("/journals", {}))
    if as_json:
        print_json({"journals": journals})
        return
    columns = ("id", "node_id", "opened_at", "shipped_at", "age_s", "position")
    rows = [tuple(cell(journal[name]) for name in columns) for journal in journals]
    print_table(("id", "node", "opened", "last shipment", "age (s)", "position"), rows)


def close_journal_command(
    context: typer.Context,
    journal: Annotated[str, typer.Argument(metavar="ID", help="The journal, as `usage journals` lists it.")],
    as_json: Json = False,
) -> None:
    """Give up the journal of a node that never comes back: what its calls are known to hold is charged."""
    closed: Any = administer(context, lambda api: api.ask("POST", f"/journals/{journal}/close"))
    if as_json:
        print_json(closed)
        return
    print_lines(f"{closed['id']} is given up; another node closes it within a minute.")
