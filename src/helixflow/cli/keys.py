"""`helixflow keys`: API keys, through the auth service of the running platform."""

import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from helixflow.cli.invocation import invocation_of
from helixflow.cli.output import format_time, print_json, print_lines, print_table
from helixflow.core.errors import ExitCode, UserError

if TYPE_CHECKING:
    from helixflow.clients.auth import KeyAdmin, KeyInfo

app = typer.Typer(
    help="Create, list and revoke API keys; the service must be running.",
    epilog="Example:\n\n$ helixflow keys create laptop --expires 30d",
    no_args_is_help=True,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
T = TypeVar("T")

_SPAN = re.compile(r"([0-9]{1,6})([hdw])")
_SPAN_S = {"h": 3600, "d": 86_400, "w": 7 * 86_400}


@app.command(
    "create",
    epilog="Example:\n\n$ helixflow keys create laptop\n\n$ helixflow keys create ci --expires 30d --quiet > ci.key",
)
def create_command(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the key is for.")],
    expires: Annotated[
        str | None, typer.Option("--expires", help="30d, 12h, 2w, or a date (2027-01-31) or time in UTC.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the key and nothing else.")] = False,
    as_json: Json = False,
) -> None:
    """Create an API key. It is shown once and cannot be had again."""
    expires_at = parse_expiry(expires, time.time()) if expires is not None else 0
    key, secret = _ask(context, lambda admin: admin.create(name, expires_at))
    if as_json:
        print_json({**_as_dict(key), "key": secret})
    elif quiet:
        print_lines(secret)
    else:
        print_lines(
            f"Created {key.name} ({key.key_id}), {_expiry(key)}.",
            "",
            f"  {secret}",
            "",
            "Keep it now: it cannot be shown again.",
        )


@app.command("list", epilog="Example:\n\n$ helixflow keys list\n\n$ helixflow keys list --json")
def list_command(context: typer.Context, as_json: Json = False) -> None:
    """List all keys, newest first, without their secrets."""
    keys = _ask(context, lambda admin: admin.list_keys())
    if as_json:
        print_json({"keys": [_as_dict(key) for key in keys]})
        return
    print_table(
        ("id", "name", "key", "created", "state"),
        [(key.key_id, key.name, key.hint, format_time(key.created_at), _state(key)) for key in keys],
    )


@app.command("revoke", epilog="Example:\n\n$ helixflow keys revoke key_abc123")
def revoke_command(
    context: typer.Context,
    key_id: Annotated[str, typer.Argument(metavar="KEY_ID", help="Id of the key, as `keys list` shows it.")],
    as_json: Json = False,
) -> None:
    """Revoke a key for good; it stops working within a second."""
    key = _ask(context, lambda admin: admin.revoke(key_id))
    if as_json:
        print_json(_as_dict(key))
    else:
        print_lines(f"revoked {key.name} ({key.key_id})")


def parse_expiry(text: str, now: float) -> int:
    """Epoch seconds for `30d`, `12h`, `2w`, a date or a time (UTC unless it says otherwise). Raises `UserError`."""
    if (match := _SPAN.fullmatch(text.strip().lower())) is not None:
        at = int(now) + int(match[1]) * _SPAN_S[match[2]]
    else:
        try:
            moment = datetime.fromisoformat(text.strip())
            at = int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
        except (ValueError, OverflowError) as exc:
            raise UserError(
                f"--expires {text!r}: give a span (30d, 12h, 2w), a date (2027-01-31) or a time", ExitCode.USAGE
            ) from exc
    if at <= now:
        raise UserError(f"--expires {text!r}: lies in the past", ExitCode.USAGE)
    if at > 253_402_300_799:
        raise UserError(f"--expires {text!r}: lies after the year 9999; leave it out for never", ExitCode.USAGE)
    return at


def _ask(context: typer.Context, question: "Callable[[KeyAdmin], Awaitable[T]]") -> T:
    """Puts one question to the auth service. Raises `UserError` (UNAVAILABLE) when none runs, `HelixError` else."""
    settings = invocation_of(context).load_settings()
    from helixflow.clients.auth import KeyAdmin
    from helixflow.rpc.channels import create_channel
    from helixflow.rpc.sockets import is_listening, socket_path

    path = socket_path(settings.run_dir, "control")
    try:
        running = is_listening(path)
    except OSError as exc:
        raise UserError(f"{path}: {exc.strerror}", ExitCode.UNAVAILABLE) from exc
    if not running:
        raise UserError(
            f"no HelixFlow runs with data_dir {settings.data_dir} (nothing listens on {path}); "
            "start it with: helixflow serve",
            ExitCode.UNAVAILABLE,
        )

    import asyncio

    async def put() -> T:
        channel = create_channel(path)
        try:
            return await question(KeyAdmin(channel))
        finally:
            await channel.close()

    return asyncio.run(put())


def _as_dict(key: "KeyInfo") -> dict[str, Any]:
    return {**asdict(key), "state": _state(key).split(" ")[0]}


def _state(key: "KeyInfo") -> str:
    if key.revoked_at:
        return "revoked"
    if key.expires_at and key.expires_at <= time.time():
        return "expired"
    return f"valid ({_expiry(key)})"


def _expiry(key: "KeyInfo") -> str:
    return f"expires {format_time(key.expires_at)}" if key.expires_at else "does not expire"
