"""`helixflow usage rerate`: rates the ledger again and says what differs. It changes nothing."""

import time
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from helixflow.cli.administration import Json, administer
from helixflow.cli.moments import parse_past
from helixflow.cli.output import print_json, print_lines, print_table
from helixflow.core.errors import ErrorKind, ExitCode, HelixError, UserError

if TYPE_CHECKING:
    from helixflow.cli.admin_api import AdminApi

EPILOG = (
    "Example:\n\n$ helixflow usage rerate --dry-run --from 30d\n\n"
    "$ helixflow usage rerate --dry-run --from 2027-01-01 --to 2027-02-01 --current"
)
# A line holds a few differences at most.
_MAX_LINE: Final = 64 * 1024


def rerate_command(
    context: typer.Context,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what differs and change nothing: the only way.")
    ] = False,
    begin: Annotated[
        str | None,
        typer.Option("--from", metavar="WHEN", help="Requests since then: 30d, a date or a time; default: all."),
    ] = None,
    end: Annotated[str | None, typer.Option("--to", metavar="WHEN", help="Requests before then; default: now.")] = None,
    current: Annotated[
        bool, typer.Option("--current", help="By the prices known now for that time, not by those recorded.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Rate requests again by the prices that they were rated with. Exits with 1 when something differs."""
    if not dry_run:
        raise UserError("give --dry-run: what was charged is never changed", ExitCode.USAGE)
    now = time.time()
    query: dict[str, Any] = {
        name: parse_past(text, now, f"--{name}") for name, text in (("from", begin), ("to", end)) if text is not None
    }
    if current:
        query["current"] = "true"
    found = administer(context, lambda api: _check(api, query))
    if as_json:
        print_json(found)
    else:
        _show(found)
    return ExitCode.FAILURE if found["differing"] else ExitCode.OK


async def _check(api: "AdminApi", query: dict[str, Any]) -> dict[str, Any]:
    """The last line of the check. Raises `HelixError`, UPSTREAM_INVALID for one that breaks off."""
    import msgspec

    tail = b""
    async with api.open("/prices/check", query) as response:
        while data := await response.read():
            tail = (tail + data)[-_MAX_LINE:]
    last = tail.rstrip(b"\n").rpartition(b"\n")[2]
    try:
        found: dict[str, Any] = msgspec.json.decode(last, type=dict[str, Any])
    except msgspec.DecodeError as exc:
        raise _broken_off() from exc
    if not tail.endswith(b"\n") or not found.get("done"):
        raise _broken_off()
    return found


def _broken_off() -> HelixError:
    return HelixError(ErrorKind.UPSTREAM_INVALID, "The check broke off; try again.")


def _show(found: dict[str, Any]) -> None:
    print_lines(
        f"{found['rows']} requests, {found['differing']} differ; "
        f"recorded {found['recorded']}, rated {found['rated']} US dollars"
    )
    if found["differences"]:
        print_table(
            ("request", "recorded", "rated", "price version"),
            [
                (entry["call_id"], entry["recorded"], entry["rated"] or "price unknown", entry["price_version"])
                for entry in found["differences"]
            ],
        )
