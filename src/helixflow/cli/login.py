"""`helixflow login` and `helixflow logout`."""

import time
from typing import Annotated

import typer

from helixflow.cli.administration import BaseUrl, ask_openly, login_of, present, server_of
from helixflow.cli.output import print_lines
from helixflow.cli.prompts import ask_line, ask_secret

EPILOG = "Example:\n\n$ helixflow login --email ada@example.com"
LOGOUT_EPILOG = "Example:\n\n$ helixflow logout"


def login_command(
    context: typer.Context,
    email: Annotated[str | None, typer.Option("--email", help="E-mail of your account; asked for if absent.")] = None,
    base_url: BaseUrl = None,
    organisation: Annotated[
        str | None, typer.Option("--organisation", metavar="ID", help="One of your organisations; default: your own.")
    ] = None,
    project: Annotated[
        str | None,
        typer.Option(
            "--project",
            metavar="ID",
            help="The project that you work in; default: the oldest in which you may use models.",
        ),
    ] = None,
) -> None:
    """Sign in for the commands that administer. The password is asked for, never given on the command line."""
    server, logins = server_of(context, base_url)
    email = email or ask_line("E-mail")
    password = ask_secret("Password")
    body = present(email=email, password=password, organisation_id=organisation, project_id=project)
    now = time.time()
    tokens = ask_openly(server, "/auth/login", body)
    if "challenge" in tokens:
        code = ask_line("Code of your authenticator app, or a recovery code")
        tokens = ask_openly(server, "/auth/mfa/verify", {"challenge": tokens["challenge"], "code": code})
    with logins.locked():
        logins.keep(server.root_url, login_of(email, tokens, now))
    print_lines(f"Signed in to {server.root_url} as {email}.")
    if not server.ours:
        print_lines(f"For the next commands: export HELIXFLOW_BASE_URL={server.root_url}")
    if server.from_environment:
        print_lines("HELIXFLOW_API_KEY is set and goes first: unset it to act as yourself.")


def logout_command(context: typer.Context, base_url: BaseUrl = None) -> None:
    """End the session of `helixflow login`."""
    server, logins = server_of(context, base_url)
    with logins.locked():
        login = logins.find(server.root_url)
        if login is None:
            print_lines(f"Not signed in to {server.root_url}.")
            return
        # Here first: whatever the server says, this user is signed out on this machine.
        logins.forget(server.root_url)
        ask_openly(server, "/auth/logout", {"refresh_token": login.refresh_token})
    print_lines(f"Signed out of {server.root_url}.")
