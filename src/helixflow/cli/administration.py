"""What the commands that administer have in common: which server, with which credential, and one question to it."""

import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar
from urllib.parse import quote

import typer

from helixflow.cli.invocation import invocation_of
from helixflow.cli.output import print_json, print_lines, print_table
from helixflow.core.errors import ErrorKind, ExitCode, HelixError, UserError

if TYPE_CHECKING:
    from helixflow.cli.admin_api import AdminApi
    from helixflow.cli.logins import Login, Logins

T = TypeVar("T")
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
BaseUrl = Annotated[
    str | None, typer.Option("--base-url", help="Server; default: $HELIXFLOW_BASE_URL, or the configured gateway.")
]
Project = Annotated[str | None, typer.Option("--project", metavar="ID", help="In this project; default: everywhere.")]

# An access token that ends sooner is renewed first.
_MARGIN_S: Final = 30


@dataclass(frozen=True, slots=True)
class Server:
    """Where the admin API is, without /api/v1. `credential` is what the environment or the data directory gives."""

    root_url: str
    credential: str | None
    from_environment: bool
    ours: bool


def server_of(context: typer.Context, base_url: str | None = None) -> "tuple[Server, Logins]":
    """The server that a command is for, and the sessions of this user. Raises `UserError` (CONFIG)."""
    settings = invocation_of(context).load_settings()
    from helixflow.cli.logins import Logins
    from helixflow.cli.target import choose_target
    from helixflow.settings.client import client_environment

    # A key for somebody else's models has no business here.
    environment = replace(client_environment(), openai_api_key=None)
    target = choose_target(settings, environment, base_url, None)
    root_url = target.base_url.rstrip("/").removesuffix("/v1")
    server = Server(root_url, target.api_key, environment.api_key is not None, target.ours)
    return server, Logins(environment.config_home.expanduser() / "helixflow")


def administer(context: typer.Context, question: "Callable[[AdminApi], Awaitable[T]]") -> T:
    """Puts one question to the admin API: with HELIXFLOW_API_KEY, else as who has signed in, else with the first key of
    this data directory. Raises `HelixError`, or `UserError` when nothing answers or no credential is there.
    """
    server, logins = server_of(context)
    import asyncio

    async def put() -> T:
        token = None if server.from_environment else await _token(server, logins)
        if token is None:
            return await _ask_with_key(context, server, question)
        try:
            return await ask_server(server, token, question)
        except HelixError as exc:
            # It may have ended before its time, with the key that signed it; then nothing was done.
            if exc.kind is not ErrorKind.INVALID_TOKEN or (renewed := await _token(server, logins, token)) is None:
                raise
        return await ask_server(server, renewed, question)

    return asyncio.run(put())


def ask_openly(server: Server, path: str, body: dict[str, Any]) -> Any:
    """What `POST path` answers to anybody, without a credential. Raises as `administer` does."""
    import asyncio  # here and not above: `helixflow version` and `--help` need none of it

    return asyncio.run(ask_server(server, None, lambda api: api.ask("POST", path, body)))


async def ask_server(server: Server, credential: str | None, question: "Callable[[AdminApi], Awaitable[T]]") -> T:
    """One question with that credential. Raises as `administer` does."""
    from helixflow.cli.admin_api import AdminApi

    api = AdminApi(server.root_url, credential)
    try:
        return await question(api)
    except HelixError as exc:
        if server.ours and exc.kind is ErrorKind.UPSTREAM_UNAVAILABLE:
            message = f"{exc.message}; start the service with: helixflow serve"
            raise UserError(message, ExitCode.UNAVAILABLE) from exc
        raise
    finally:
        await api.close()


def login_of(email: str, tokens: dict[str, Any], now: float) -> "Login":
    """What is kept of an answer with tokens."""
    from helixflow.cli.logins import Login

    return Login(
        email,
        tokens["access_token"],
        now + tokens["expires_in"],
        tokens["refresh_token"],
        now + tokens["refresh_expires_in"],
    )


async def _ask_with_key(context: typer.Context, server: Server, question: "Callable[[AdminApi], Awaitable[T]]") -> T:
    """With what the environment or the data directory gives."""
    if server.credential is not None and not server.from_environment:
        _note_bootstrap_key(context)
    try:
        return await ask_server(server, server.credential, question)
    except HelixError as exc:
        if server.credential is not None or exc.kind is not ErrorKind.INVALID_TOKEN:
            raise
        raise UserError("sign in first: helixflow login, or set HELIXFLOW_API_KEY") from exc


async def _token(server: Server, logins: "Logins", refused: str | None = None) -> str | None:
    """The access token of who has signed in, renewed where that is due, or where the server has `refused` it; None when
    nobody has.
    """
    login = logins.find(server.root_url)
    if login is None or _works(login, refused):
        return login.access_token if login is not None else None
    with logins.locked():
        # Another command may have renewed it meanwhile.
        login = logins.find(server.root_url)
        if login is None or _works(login, refused):
            return login.access_token if login is not None else None
        body = {"refresh_token": login.refresh_token}
        now = time.time()
        try:
            tokens = await ask_server(server, None, lambda api: api.ask("POST", "/auth/refresh", body))
        except HelixError as exc:
            if exc.kind not in (ErrorKind.INVALID_TOKEN, ErrorKind.INVALID_CREDENTIALS):
                raise
            logins.forget(server.root_url)
            raise UserError("the session has ended; sign in again: helixflow login") from exc
        renewed = login_of(login.email, tokens, now)
        logins.keep(server.root_url, renewed)
        return renewed.access_token


def _works(login: "Login", refused: str | None) -> bool:
    return login.access_token != refused and login.access_expires_at - _MARGIN_S > time.time()


def _note_bootstrap_key(context: typer.Context) -> None:
    """Tells people, and no programs, as whom they act: with more rights than they may expect."""
    to_program = context.params.get("as_json", False) and not sys.stdout.isatty()
    if sys.stderr.isatty() and not to_program:
        sys.stderr.write("helixflow: nobody is signed in: acting with the bootstrap key of this server\n")


def part(identifier: str) -> str:
    """An id as one segment of a path."""
    return quote(identifier, safe="") or "%20"


def present(**fields: Any) -> dict[str, Any]:
    """The fields that have a value."""
    return {name: value for name, value in fields.items() if value is not None}


def show_list(name: str, columns: tuple[str, ...], entries: list[dict[str, Any]], as_json: bool) -> None:
    """Entries of the API as JSON under `name`, or as a table with those fields as columns."""
    if as_json:
        print_json({name: entries})
        return
    headings = [column.removesuffix("_at").replace("_", " ") for column in columns]
    print_table(headings, [tuple(cell(entry.get(column)) for column in columns) for entry in entries])


def show_fields(headline: str, fields: Sequence[tuple[str, str]]) -> None:
    """One thing for people: its name, then a line for each of its fields."""
    width = max(len(name) for name, _ in fields)
    print_lines(headline, *(f"{name:{width}}  {value}" for name, value in fields))


def show_token(headline: str, token: str, email: str, expires_at: str) -> None:
    """What somebody else is to redeem, for people."""
    print_lines(
        headline,
        "",
        f"  {token}",
        "",
        f"Give it to {email}, for helixflow redeem: it works until {cell(expires_at)} and cannot be shown again.",
    )


def cell(value: Any) -> str:
    """A value of the API in a table."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    text = str(value)
    # A time of RFC 3339, to the minute.
    return f"{text[:10]} {text[11:16]} UTC" if len(text) == 20 and text.endswith("Z") and text[10] == "T" else text
